"""Images a second of common.Photos beside torchvision's ImageFolder in a DataLoader, 2 workers each.

    python tests/benchmarks/loader.py          # makes 4,000 JPEGs of 300 to 500 pixels, 3 rounds, 2 minutes

The sides take turns, a fresh process each time. An epoch is one pass over all images in random order, with random
resized crop to 224 pixels; ours also flips, and hands over uint8, which the step makes floats on its device. Prints medians, ratios and peak memory; asserts nothing.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[2]))
import common

SIDES = {
    "torchvision": "ImageFolder, RandomResizedCrop, ToTensor, DataLoader",
    "streamed": "Photos that read their files in every epoch",
    "cached": "Photos in memory, after they were read once",
}


def make_images(root, count):
    random = np.random.default_rng(0)
    for i in range(count):
        h, w = random.integers(300, 501, 2).tolist()
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((w, h), 3)
        pixels = np.asarray(coarse).astype(int) + random.integers(-12, 13, (h, w, 3))
        path = root / ("train" if i % 100 else "test") / str(i % 10) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def one_side(side, root):
    torch.manual_seed(0)
    if side == "torchvision":
        crop = transforms.Compose([transforms.RandomResizedCrop(224), transforms.ToTensor()])
        images = torchvision.datasets.ImageFolder(root / "train", crop)
        epoch = lambda: torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=2, drop_last=True)
    else:
        cache = 8 if side == "cached" else 0
        data = common.load_data("folder", root, 224, workers=2, cache_gb=cache)
        images, labels = data[:2]
        epoch = lambda: common.loader(images, labels, common.batches(len(images), 64, 0), train=True)
    start, count = time.perf_counter(), 0
    for x, _ in epoch():
        assert x.shape[1:] == (3, 224, 224) and x.dtype == (torch.float32 if side == "torchvision" else torch.uint8)
        count += len(x)
    seconds = time.perf_counter() - start
    print(count / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="one side, in this process: images a second, peak GiB")
    parser.add_argument("--root", type=Path)
    mine = parser.parse_args()
    if mine.side:
        return one_side(mine.side, mine.root)
    found = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), mine.images)
        for _ in range(mine.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--root", folder]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found[side].append([float(word) for word in run.stdout.split()[-2:]])
    median = {side: [statistics.median(column) for column in zip(*rows)] for side, rows in found.items()}
    for side, what in SIDES.items():
        rate, memory = median[side]
        ratio = rate / median["torchvision"][0]
        print(f"{side:12s} {rate:7.0f} images/s, {ratio:5.2f} x, peak {memory:.2f} GiB   {what}")


if __name__ == "__main__":
    main()
