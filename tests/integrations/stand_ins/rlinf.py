"""RLinf: what it changes of DreamZero's and openpi's classes, and a pi-0 of its own."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .openpi import PI0Pytorch, make_att_2d_masks


def forward_train(wan, x, first_position, video, action_register_length):
    """Put in the place of ``CausalWanModel``'s: blocks are checkpointed the reentrant way, all by position."""
    e = wan.time_projection(torch.arange(x.shape[1])[None, :, None].sin().to(x)).unflatten(2, (6, -1))
    e, context = e.expand(x.shape[0], -1, -1, -1), wan.context.expand(x.shape[0], -1, -1)
    shared = wan._create_freqs(first_position, video), wan.freqs_action, wan.freqs_state, action_register_length
    for block in wan.blocks:
        x, _ = checkpoint(block, x, e, *shared, context, None, None, 0, True, use_reentrant=True)
    return x, None


class OpenPi0ForRLActionPrediction(PI0Pytorch):
    """Makes its masks by what its own module imports, in a step of its own."""

    def forward(self, prefix, pads, suffix):
        suffix_pads, suffix_blocks = self._suffix(suffix)
        pad_masks = torch.cat([pads, suffix_pads], dim=1)
        att_masks = torch.cat([torch.zeros_like(pads), suffix_blocks], dim=1)
        mask = self._prepare_attention_masks_4d(make_att_2d_masks(pad_masks, att_masks))
        return self.paligemma_with_expert((prefix, suffix), mask)[1]


class Attention(nn.Module):
    """Both experts of ``Pi0`` in one module: lists of projections."""

    def __init__(self, widths=(20, 12), num_heads=8, head_dim=32):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, 1, head_dim
        self.q_proj = nn.ModuleList([nn.Linear(width, num_heads * head_dim, bias=False) for width in widths])
        self.k_proj, self.v_proj = (
            nn.ModuleList([nn.Linear(width, head_dim, bias=False) for width in widths]) for _ in range(2)
        )
        self.o_proj = nn.ModuleList([nn.Linear(num_heads * head_dim, width, bias=False) for width in widths])


class Pi0(nn.Module):
    """The model of ``openpi_rlinf``: none of openpi's PyTorch classes."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
