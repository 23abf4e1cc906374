"""Evaluate a network on CIFAR-10, CIFAR-100 or the embedded digits: accuracy, MACs and latency at every point.

    python3 eval_cifar10.py --pretrained=<file or published name> --model=ResNet56_DoubleShared --shared_rank=16

Files written by this project and published names need no --model and no flags: they know their own.
"""

import torch

import cli
import dataloader
import engine
import report
import utils
from models import create_model, load_checkpoint

SCRIPT = cli.Script(
    description=__doc__,
    datasets=("cifar10", "cifar100", "digits"),
    model="ResNet56_DoubleShared",
    training=False,
    defaults={},
)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = utils.start_device(args.visible_device)
    model = create_model(args.model, args.dataset, **args.model_flags)
    loaded = load_checkpoint(model, args.pretrained, args.dataset, args.cache)
    utils.say(f"{loaded.path}: {loaded.format}")
    points = [model.point(name) for name in args.point.split(",")] if args.point else None
    if args.fold:
        model = model.fold()
    model.to(device, memory_format=torch.channels_last)
    data = dataloader.cifar(args.dataset, args.dataset_path, args.batch_size, device, mean=args.mean, std=args.std)
    rows = engine.evaluate(model, data.test, points, data.valid or data.train, args.amp, args.latency_batch)
    print(f"Eval_Acc_top1 = {rows[-1].top1:.3f}")
    print(f"Eval_Acc_top5 = {rows[-1].top5:.3f}")
    folder = args.report or f"reports/{cli.folder_name(args)}"
    report.write(rows, folder, cli.all_flags(args), data.source, model, data.shape)


if __name__ == "__main__":
    cli.run(main)
