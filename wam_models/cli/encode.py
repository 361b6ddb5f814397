"""``wam encode``: latents of Wan's VAE and text of UMT5, written to disk once for many trainings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from ..data import LeRobotDataset, wan_vae_codec
from ..data.encoded import encode_dataset, encode_texts, folder_digest
from ..runtime.checks import check_device
from ..text import umt5_encoder
from ..train.recipe import Recipe


def run(args: argparse.Namespace) -> int:
    """``wam encode``; under torchrun each process encodes its share of the episodes, on its GPU."""
    recipe = Recipe.read(args.config, args.set)
    if args.data is None and len(recipe.data) != 1:
        raise ValueError(f"--data must be given, or one data set in CONFIG, got {len(recipe.data)}")
    if args.out is None:
        raise ValueError("--out must be given: the folder of what is encoded")
    if args.vae is None and args.text is None:
        raise ValueError("--vae or --text must be given: a folder with the weights of Wan's VAE, or of UMT5")
    root = Path(recipe.data[0].path) if args.data is None else args.data
    camera = args.camera or (None if args.data is not None else recipe.data[0].camera)
    part, parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = args.device or recipe.device or "cpu"
    device = check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    dataset = LeRobotDataset(root, camera)
    if args.vae is not None:
        done, kept = encode_dataset(
            dataset, wan_vae_codec(args.vae, device), args.out, actions_per_frame=recipe.train.actions_per_frame,
            part=part, parts=parts,
            progress=lambda numbers: tqdm(numbers, "encode", unit="episode", disable=part > 0, dynamic_ncols=True),
        )  # fmt: skip
        print(f"{done} episodes encoded into {args.out}, {kept} were there")
    if args.text is not None and part == 0:
        encoder = umt5_encoder(args.text, tokens=args.text_tokens, device=str(device))
        made_by = f"{folder_digest(args.text)} {args.text_tokens}"
        tasks = [task for episode in dataset.episodes for task in episode.tasks]
        print(f"{encode_texts(['', *tasks], encoder, made_by, args.out)} instructions encoded into {args.out}")
    return 0
