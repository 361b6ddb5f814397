"""``wam mask``: a program's visibility as a picture, and what its plan costs."""

from __future__ import annotations

import argparse

from wam_kernels import PROGRAMS, RULE_PROGRAMS, Geometry

from ..draw.masks import EXAMPLE_SIZES, describe, draw_mask, program_image
from ..draw.style import save_small
from .parser import make_parser


def run(args: argparse.Namespace) -> int:
    """``wam mask``."""
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must be a file name that ends in .png, got {args.out}")
    if args.program in RULE_PROGRAMS:
        return _run_named(args)
    if args.program not in PROGRAMS:
        raise ValueError(f"--program must be one of {(*PROGRAMS, *RULE_PROGRAMS)}, got {args.program!r}")
    geometry = Geometry(
        program=args.program,
        video_frames=args.frames + args.prefix_frames,
        video_tokens=args.video_tokens,
        action_frames=args.frames,
        action_tokens=args.action_tokens,
        chunk_size=args.chunk_size,
        window=args.window,
        history=args.history,
        chunk_origin=args.chunk_origin,
        prefix_frames=args.prefix_frames,
        singleton_frame=args.singleton_frame,
    )
    print(f"program        {geometry.program}")
    print(describe(geometry))
    if args.out is not None:
        save_small(draw_mask(geometry), args.out)
        print(f"picture        {args.out}")
    return 0


def _run_named(args: argparse.Namespace) -> int:
    """A program of another system, at its example sizes: it has sizes of its own, which no flag names."""
    defaults = vars(make_parser().parse_args(["mask"]))
    given = [
        name for name, value in defaults.items() if name not in ("program", "out") and getattr(args, name) != value
    ]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{flags} must be left out with --program {args.program}, which is drawn at fixed sizes; other sizes: "
            f"wam_kernels.RULE_PROGRAMS[{args.program!r}](...)"
        )
    if args.program not in EXAMPLE_SIZES:
        raise ValueError(
            f"--program must be one that is drawn at fixed sizes, {(*PROGRAMS, *EXAMPLE_SIZES)}, got {args.program!r}; "
            f"use program_image(wam_kernels.RULE_PROGRAMS[{args.program!r}](...), 860)"
        )
    sizes = EXAMPLE_SIZES[args.program]
    program = RULE_PROGRAMS[args.program](**sizes)
    print(f"program        {program.name}")
    print(f"sizes          {', '.join(f'{name} {value}' for name, value in sizes.items())}")
    print(describe(program))
    if args.out is not None:
        save_small(program_image(program, 860), args.out)
        print(f"picture        {args.out}")
    return 0
