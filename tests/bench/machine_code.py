"""A kernel written by hand, as it is disassembled: two loops of work, one in the other, and loops that only wait."""

# The outer loop draws work and ends at 0x01c0; the step is 0x0040 to 0x0180. 0x0200 waits for a barrier and comes back;
# where threads have parted BRA.DIV leads to 0x0240; 0x02a0 is the loop of the warps that copy.
LINES = """
0000 S2R R0, SR_TID.X
0010 @P5 BRA 0x2a0
0020 WARPSYNC.ALL
0030 MOV R1, RZ
0040 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3
0050 @!P0 BRA 0x200
0060 BRA.DIV UR6, 0x240
0070 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT
0080 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
0090 HGMMA.64x128x16.F32.BF16 R88, R212, gdesc[UR4].tnspB, R88, gsb0
00a0 WARPGROUP.DEPBAR.LE gsb0, 0x1
00b0 @P1 BRA 0xd0
00c0 FMNMX R5, R6, R7, !PT
00d0 FMUL R5, R5, R8
00e0 MUFU.EX2 R9, R5
00f0 MUFU.EX2 R10, R5
0100 F2FP.BF16.F32.PACK_AB R11, R9, R10
0110 LDS.128 R12, [R13]
0120 STS R13, R12
0130 LDSM.16.M88.4 R16, [R20]
0140 LDGSTS.E.BYPASS.128 [R4], [R2.64]
0150 IMAD R1, R1, 0x2, RZ
0160 WARPGROUP.DEPBAR.LE gsb0, 0x0
0170 ISETP.GE.AND P2, PT, R1, R2, PT
0180 @!P2 BRA 0x40
0190 STG.E R5, [R2.64]
01a0 ATOMG.E.ADD R0, [R2.64], R1
01b0 ISETP.GE.AND P3, PT, R0, R1, PT
01c0 @!P3 BRA 0x20
01d0 EXIT
0200 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3
0210 @!P0 BRA 0x200
0220 BRA 0x60
0240 SHFL.IDX P0, R57, R26, R27, R28
0250 BRA 0x70
02a0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3
02b0 @!P0 BRA 0x2f0
02c0 UTMALDG.5D [UR8], [UR4]
02d0 @!P4 BRA 0x2a0
02e0 EXIT
02f0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3
0300 @!P0 BRA 0x2f0
0310 BRA 0x2c0
"""
NAME = "by_hand"


def cuobjdump() -> str:
    lines = (line.split(maxsplit=1) for line in LINES.strip().splitlines())
    code = "\n".join(f"        /*{address}*/   {rest} ;   /* 0x000fe200000001ff */" for address, rest in lines)
    return f'\t\tFunction : {NAME}\n\t.headerflags @"EF_CUDA_SM90"\n{code}\n'


def nvdisasm() -> str:
    """The same with labels in place of addresses."""
    lines = [line.split(maxsplit=1) for line in LINES.strip().splitlines()]
    targets = sorted({rest.rpartition("0x")[2] for _, rest in lines if "BRA" in rest}, key=lambda t: int(t, 16))
    label = {int(target, 16): f".L_x_{n}" for n, target in enumerate(targets)}
    text = [f'.section\t.text.{NAME},"ax",@progbits']
    for address, rest in lines:
        if int(address, 16) in label:
            text.append(f"{label[int(address, 16)]}:")
        if "BRA" in rest:
            before, _, target = rest.rpartition("0x")
            rest = f"{before}`({label[int(target, 16)]})"
        text.append(f"        /*{address}*/   {rest} ;")
    return "\n".join(text)
