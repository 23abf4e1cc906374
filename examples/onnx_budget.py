"""Run a network that `--export onnx DIR --point all` wrote, within a budget and without this project.

    python3 examples/onnx_budget.py DIR BUDGET IMAGE ...

BUDGET is multiply-accumulates of an image, or milliseconds as 2.5ms. Needs onnxruntime, numpy and Pillow.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # for others, Pillow starts programs


def choose(table, budget):
    """The most accurate point within a budget; of points whose accuracy is not known the dearest."""
    unit = "ms" if budget.endswith("ms") else "macs"
    try:
        most = float(budget.removesuffix("ms"))
    except ValueError:
        raise ValueError(
            f"the budget {budget!r} is neither multiply-accumulates (20e6) nor milliseconds (2.5ms)"
        ) from None
    within = [point for point in table["points"] if point[unit] is not None and point[unit] <= most]
    return max(within, key=lambda point: (point["top1"] or 0, point[unit])) if within else None


def read(file, table):
    """An image as the network takes it: float32 (1, 3, height, width)."""
    image, (_, height, width) = Image.open(file, formats=FORMATS), table["input_size"]
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its values have no scale; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which convert would cut off at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    image = image.convert("RGB")
    sides = [side * table["resize"] // min(image.size) for side in image.size]
    image = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    return ((pixels - table["mean"]) / table["std"]).transpose(2, 0, 1)[None].astype(np.float32)


def run(sessions, thresholds, image):
    """Probabilities (classes,) and how many files ran: the image leaves as soon as the network is sure."""
    state = [image]
    for count, session in enumerate(sessions):
        inputs = {value.name: array for value, array in zip(session.get_inputs(), state)}
        (logits, *state) = session.run(None, inputs)
        odds = np.exp(logits[0] - logits[0].max())
        if (odds / odds.sum()).max() >= thresholds[count]:
            break
    return odds / odds.sum(), count + 1


@contextlib.contextmanager
def explaining(what):
    """Say what could not be used: for a damaged file, Pillow and ONNX Runtime can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {str(error).strip() or type(error).__name__}") from error


def main(folder, budget, *files):
    table = json.loads(Path(folder, "table.json").read_text(encoding="utf-8"))
    point = choose(table, budget)
    if not point:
        unit = "ms" if budget.endswith("ms") else "macs"
        least = min((point[unit] for point in table["points"] if point[unit] is not None), default="unknown")
        sys.exit(f"error: no point in {folder} fits the budget {budget}; the least is {least}")
    names = [*point.get("after", []), point["file"]]
    with explaining(f"cannot load the network in {folder}"):
        sessions = [onnxruntime.InferenceSession(Path(folder, name)) for name in names]
    thresholds = point.get("thresholds", [2] * len(names))  # 2: no image leaves before the last file
    for file in files:
        with explaining(f"cannot read {file}"):
            image = read(file, table)
        probabilities, count = run(sessions, thresholds, image)
        best = int(probabilities.argmax())
        print(f"{file}: {table['classes'][best]}, {100 * probabilities[best]:.1f} %, {point['point']}, {count} files")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        print("error: name a folder, a budget and one image or more", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
