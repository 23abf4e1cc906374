"""Evaluate a network on ImageNet (ILSVRC2012), or on any folder of images with val/.

    python3 eval_ilsvrc.py --dataset_path=<path> --pretrained=<file or published name> --model=ResNet34_DoubleShared

With --image it says what single images are, with --export it writes the network for other programs.

Files written by this project and published names need no --model and no flags: they know their own.
"""

from functools import partial

import dataloader
import engine
import utils
from engine import cli, flags, tasks
from models import checkpoints, create_model, load_checkpoint

SCRIPT = cli.Script(
    __doc__,
    datasets=("ilsvrc",),
    model="ResNet34_DoubleShared",
    training=False,
    add_flags=(flags.add_image_folder,),
)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device)
    cli.complete(args, device)
    load = partial(
        dataloader.imagefolder,
        args.dataset_path,
        args.batch_size,
        device,
        workers=args.workers,
        resize=args.resize,
        crop=args.crop,
        train=False,
        valid=checkpoints.held_out(args.pretrained),
        seed=args.seed,
        mean=args.mean,
        std=args.std,
    )
    if args.image or args.export:  # without images of the data set the file says how many classes there are
        stored = checkpoints.describe(args.pretrained).get("classes")
        names = dataloader.class_names(args.dataset, args.dataset_path, stored)
    else:
        data = load()
        names = data.classes
    model = create_model(args.model, args.dataset, len(names), **args.model_flags)
    model = checkpoints.sub_network(model, args.pretrained)
    loaded = load_checkpoint(model, args.pretrained, args.dataset, args.cache)
    utils.say(f"{loaded.path}: {loaded.format}")
    if args.image:
        sizes = args.resize, args.crop
        images = dataloader.image_files(args.image, args.dataset, device, *sizes, args.mean, args.std)
        tasks.predict(model, images, names, load, args, loaded.path)
    elif args.export:
        tasks.write_export(model, (3, args.crop, args.crop), load, args, device, loaded.path)
    else:
        tasks.evaluate(model, lambda: data, args, device, loaded.path)


if __name__ == "__main__":
    cli.run(main)
