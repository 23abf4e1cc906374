"""Evaluate a network on CIFAR-10, CIFAR-100 or the embedded digits: accuracy, MACs and latency at every point.

    python3 eval_cifar10.py --pretrained=<file or published name> --model=ResNet56_DoubleShared --shared_rank=16

With --image it classifies single images; with --export it writes the network for other programs.

Files written by this project and published names need neither --model nor its flags: the weights record both.
"""

from functools import partial

import startup

with startup.importing(__name__):
    import dataloader
    import engine
    import utils
    from engine import cli, exports, predictions, run_images, tasks

SCRIPT = cli.Script(__doc__, datasets=("cifar10", "cifar100", "digits"), model="ResNet56_DoubleShared", training=False)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device, args.parallel)
    cli.complete(args, device)
    cli.check_network(args, 32)
    checkpoint = args.checkpoint
    model = checkpoint.build(args.model, args.dataset, **args.model_flags)
    utils.say(f"{checkpoint.path}: {checkpoint.format}")
    run = {key: args.run_images[key] for key in ("subset", "seed", "padding_mode")}
    valid = run_images.held_out_before(checkpoint, args.dataset)
    options = dict(valid=valid, classes=checkpoint.classes, mean=args.mean, std=args.std, **run)
    load = partial(dataloader.cifar, args.dataset, args.dataset_path, args.batch_size, device, **options)
    if args.image:
        names = dataloader.class_names(args.dataset, stored=checkpoint.classes)
        look = dict(dataset=args.dataset, device=device, resize=32, crop=32, mean=args.mean, std=args.std)
        read = partial(dataloader.image_files, **look)
        predictions.predict(model, read, names, load, args, device, checkpoint)
    elif args.export:
        exports.write(model, (3, 32, 32), load, args, device, checkpoint)
    else:
        tasks.evaluate(model, load, args, device, checkpoint)


if __name__ == "__main__":
    cli.run(main)
