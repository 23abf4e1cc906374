"""Folders of finished runs, for tests."""

import json


def evaluation(
    folder, model="ResNet20", dataset="cifar10", points=(("full", 40.5e6, 90.0),), epochs=2, params=1000, **flags
):
    """The folder of a finished run that reached these (point, MACs, top-1)."""
    timing = {"median": 2e-3, "low": 1e-3, "high": 4e-3, "batch": 1, "device": "a chip", "threads": 1, "runs": 9}
    rows = [
        {"point": name, "params": params, "macs": macs, "top1": top1, "top5": 99.0, "images": 10, "latency": [timing]}
        for name, macs, top1 in points
    ]
    own = {"epochs": epochs, "starting_epoch": 0, "seed": 3, "subset": None, "valid": 0, **flags}
    record = {"model": model, "dataset": dataset, "flags": own, "rows": rows, "code": "abc", "device": "a chip"}
    record["command"] = f"python3 /home/me/code/train_cifar10.py --dataset_path=/data/of/mine --save={folder}"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(record))
    test = {rows[-1]["point"]: {"top1": rows[-1]["top1"], "top5": 99.0}}
    log = [{"epoch": epoch + 1, "seconds": 60.0 + epoch, "test": test} for epoch in range(epochs)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def edit(folder, change):
    """Change the JSON of an evaluation in place: `change(record)`."""
    file = folder / "evaluation.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    return folder
