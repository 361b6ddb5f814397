"""lerobot's port of pi-0.5 in small: openpi's model, whose additive mask a function of the module makes."""

import torch

from tests.integrations.stand_ins import openpi
from tests.integrations.stand_ins.openpi import eager_attention_forward, make_att_2d_masks  # noqa: F401, as lerobot does


def prepare_attention_masks_4d(att_2d_masks, dtype=None):
    mask = torch.where(att_2d_masks[:, None, :, :], 0.0, -2.3819763e38)
    return mask if dtype is None else mask.to(dtype=dtype)


class PI05Pytorch(openpi.PI0Pytorch):
    _prepare_attention_masks_4d = property()  # there is none

    def masks(self, pad_masks, att_masks):
        return make_att_2d_masks(pad_masks, att_masks)

    def additive(self, att_2d_masks):
        return prepare_attention_masks_4d(att_2d_masks)
