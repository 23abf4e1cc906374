"""Time all networks of the zoo on this machine, and write the latencies into their JSON files.

    python3 -m tools.time_zoo

A machine's speed drifts, so times from different days cannot be compared. Here all networks are timed in turns, for
several rounds; for each latency, the round with the median is kept. Leave the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json

import startup

with startup.importing(__name__):
    import torch
    from tqdm.auto import tqdm

    import dataloader
    import utils
    from engine import cli
    from models import AdaptiveModel, Checkpoint, profile, zoo
    from models.profile import Latency
    from reporting.zoo import BATCHES

#: number of times that each network is timed
ROUNDS = 15


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", help="as for eval_cifar10.py")
    args = parser.parse_args(argv)
    files = [zoo.path_of(entry.name).with_suffix(".json") for entry in zoo.entries()]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    ready = [prepared(f"{zoo.PREFIX}{file.stem}", args.dataset_path) for file in files]
    turns = [
        (network, images, point, batch)
        for (network, images), record in zip(ready, records, strict=True)
        for point in record["points"]
        for batch in BATCHES
    ]
    for point in (point for record in records for point in record["points"]):
        point["latency"] = []
    rounds = [
        [timed(*turn) for turn in tqdm(turns, f"round {number + 1}", disable=not utils.show_progress())]
        for number in range(ROUNDS)
    ]
    for (_, _, point, _), latencies in zip(turns, zip(*rounds), strict=True):
        median = sorted(latencies, key=lambda latency: latency.median)[ROUNDS // 2]
        point["latency"].append(dataclasses.asdict(median))
    for file, record in zip(files, records, strict=True):
        utils.write_json(file, record)
    print(f"timed: {len(files)} networks; now: python3 -m reporting zoo")


def prepared(name: str, dataset_path: str | None) -> tuple[AdaptiveModel, torch.Tensor]:
    """A network of the zoo in the form that an evaluation with --fold runs, and a batch of test images."""
    checkpoint = Checkpoint.open(name)
    described, network = checkpoint.describe(), checkpoint.build()
    how = {key: described[key] for key in ("mean", "std") if key in described}
    data = dataloader.cifar(described["dataset"], dataset_path, max(BATCHES), torch.device("cpu"), **how)
    images, _ = next(iter(data.test))
    with contextlib.suppress(ValueError):  # some networks have nothing to merge
        network = network.fold([images[:batch] for batch in BATCHES])
    network.to(memory_format=torch.channels_last)
    checkpoint.load_prepared(network, {})
    with profile.evaluating(network):
        network.prepare(network.default_points, network.preparation(data))
    return network, images


def timed(network: AdaptiveModel, images: torch.Tensor, point: dict, batch: int) -> Latency:
    """Time a pass over `batch` of these images at a point of the zoo's JSON."""
    return profile.latency(network, images, point["name"], batch, seconds=0.2)


if __name__ == "__main__":
    cli.run(main)
