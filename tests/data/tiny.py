"""A tiny LeRobot v3 data set with known contents, so that the tests check every frame and action."""

import io
import json
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 20
KEY = "observation.images.tiled"
LENGTHS = (23, 17, 20, 18)  # not all one more than a multiple of 4
TASKS = ("lift", "push", "lift", "push")
SPLITS = {"train": "0:3", "held_out": "3:4"}


def frames(episode):
    """uint8 [T, 32, 64, 3]: textures drift by episode and frame; the mean brightness of frame t is near 40 + 5 t."""
    t = np.arange(LENGTHS[episode])[:, None, None, None]
    y, x = np.mgrid[0:32, 0:64][:, None, :, :, None]
    colour = np.array([1.0, 0.7, 0.4])
    wave = 12 * np.sin(x / (5 + episode) + t / 3) * colour + 12 * np.cos(y / 7 + episode) * (1 - colour)
    return (40 + 5 * t + wave).round().astype(np.uint8)


def actions(episode):
    """float32 [T, 7]: dimension 0 is 100 episode + t, so every action names its place; 3 to 5 never vary."""
    t = np.arange(LENGTHS[episode])
    zero = np.zeros_like(t)
    columns = [100 * episode + t, np.sin(t), np.cos(t), zero, zero, zero, np.where(t < 9, -1, 1)]
    return np.stack(columns, axis=1).astype(np.float32)


def states(episode):
    return np.repeat(actions(episode)[:, :1], 8, axis=1) + np.arange(8, dtype=np.float32)


def pngs(pictures, kind="PNG"):
    """A column of pictures as files of ``kind``."""
    cells = []
    for picture in pictures:
        held = io.BytesIO()
        Image.fromarray(picture).save(held, kind, quality=95)
        cells.append({"bytes": held.getvalue(), "path": None})
    return pa.array(cells)


def move_pictures_into_rows(root, kind="PNG"):
    """Rewrites the data set: pictures as files of ``kind`` in the data files, in place of the video; JPEG's shape has
    the channels first."""
    for file, episodes in ((0, (0, 1)), (1, (2, 3))):
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        pictures = np.concatenate([frames(e) for e in episodes])
        table = pq.read_table(path).append_column(KEY, pngs(pictures, kind))
        path.unlink()  # it may be a hard link
        pq.write_table(table, path)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table.select([c for c in table.column_names if not c.startswith("videos/")]), path)
    shutil.rmtree(root / "videos")
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][KEY] |= {"dtype": "image", "shape": [32, 64, 3] if kind == "PNG" else [3, 32, 64]}
    path.unlink()
    path.write_text(json.dumps(info | {"video_path": None}))


def wan_vae(mean, std):
    """diffusers' AutoencoderKLWan with random weights: 4 channels, 8 pixels a cell, 4 frames a latent frame."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=mean, latents_std=std
    )


def write(root):
    """Writes the data set: two data files and one video file, as the format allows."""
    count = len(LENGTHS)
    ends = np.cumsum(LENGTHS)
    starts = ends - LENGTHS
    files = [0, 0, 1, 1]
    video = root / "videos" / KEY / "chunk-000/file-000.mp4"
    for folder in (video.parent, root / "data/chunk-000", root / "meta/episodes/chunk-000"):
        folder.mkdir(parents=True)
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "g": "9"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for picture in np.concatenate([frames(i) for i in range(count)]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    for file in (0, 1):
        mine = [i for i in range(count) if files[i] == file]
        table = {
            "action": pa.array(np.concatenate([actions(i) for i in mine]).tolist(), pa.list_(pa.float32())),
            "observation.state": pa.array(np.concatenate([states(i) for i in mine]).tolist(), pa.list_(pa.float32())),
            "episode_index": np.repeat(mine, [LENGTHS[i] for i in mine]),
        }
        pq.write_table(pa.table(table), root / f"data/chunk-000/file-{file:03d}.parquet")
    meta = {
        "episode_index": list(range(count)),
        "tasks": [[t] for t in TASKS],
        "length": LENGTHS,
        "data/chunk_index": [0] * count,
        "data/file_index": files,
        "dataset_from_index": starts,
        f"videos/{KEY}/chunk_index": [0] * count,
        f"videos/{KEY}/file_index": [0] * count,
        f"videos/{KEY}/from_timestamp": starts / FPS,
        f"videos/{KEY}/to_timestamp": ends / FPS,
    }
    pq.write_table(pa.table(meta), root / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0",
        "total_episodes": count,
        "fps": FPS,
        "splits": SPLITS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {KEY: {"dtype": "video", "shape": [32, 64, 3]}, "action": {"dtype": "float32", "shape": [7]}},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text(json.dumps({"action": {"count": [int(ends[-1])]}}))
    return root
