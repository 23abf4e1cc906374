"""Evaluate a network on CIFAR-10, CIFAR-100 or the embedded digits: accuracy, MACs and latency at every point.

    python3 eval_cifar10.py --pretrained=<file or published name> --model=ResNet56_DoubleShared --shared_rank=16

With --image it says what single images are, with --export it writes the network for other programs.

Files written by this project and published names need no --model and no flags: they know their own.
"""

from functools import partial

import dataloader
import engine
import utils
from engine import cli, tasks
from models import checkpoints, create_model, load_checkpoint

SCRIPT = cli.Script(__doc__, datasets=("cifar10", "cifar100", "digits"), model="ResNet56_DoubleShared", training=False)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device)
    cli.complete(args, device)
    model = create_model(args.model, args.dataset, **args.model_flags)
    model = checkpoints.sub_network(model, args.pretrained)
    loaded = load_checkpoint(model, args.pretrained, args.dataset, args.cache)
    utils.say(f"{loaded.path}: {loaded.format}")
    options = dict(valid=checkpoints.held_out(args.pretrained), mean=args.mean, std=args.std, seed=args.seed)
    load = partial(dataloader.cifar, args.dataset, args.dataset_path, args.batch_size, device, **options)
    if args.image:
        images = dataloader.image_files(args.image, args.dataset, device, 32, 32, args.mean, args.std)
        names = dataloader.class_names(args.dataset, stored=checkpoints.training_of(loaded.content).get("classes"))
        tasks.predict(model, images, names, load, args, loaded.path)
    elif args.export:
        tasks.write_export(model, (3, 32, 32), load, args, device, loaded.path)
    else:
        tasks.evaluate(model, load, args, device, loaded.path)


if __name__ == "__main__":
    cli.run(main)
