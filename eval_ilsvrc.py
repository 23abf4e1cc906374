"""Evaluate a network on ImageNet (ILSVRC2012), or on any folder of images with val/.

    python3 eval_ilsvrc.py --dataset_path=<path> --pretrained=<file or published name> --model=ResNet34_DoubleShared

With --image it classifies single images; with --export it writes the network for other programs.

Files written by this project and published names need neither --model nor its flags: the weights record both.
"""

from functools import partial

import startup

with startup.importing(__name__):
    import dataloader
    import engine
    import utils
    from engine import cli, exports, flags, predictions, run_images, tasks

SCRIPT = cli.Script(
    __doc__,
    datasets=("ilsvrc",),
    model="ResNet34_DoubleShared",
    training=False,
    add_flags=(flags.add_image_folder,),
)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device, args.parallel)
    cli.complete(args, device)
    cli.check_network(args, args.crop)
    checkpoint, run = args.checkpoint, args.run_images
    classes = run_images.known_classes(args)
    load = partial(
        dataloader.imagefolder,
        args.dataset_path,
        args.batch_size,
        device,
        workers=args.workers,
        resize=args.resize,
        crop=args.crop,
        train=False,
        train_crop=run["crop"],
        scale=(run["min_scale"], 1.0),
        jitter=run["color_jitter"],
        subset=run["subset"],
        valid=run_images.held_out_before(checkpoint, args.dataset),
        classes=classes,
        seed=run["seed"],
        mean=args.mean,
        std=args.std,
        cache=args.cache,
        on_device=args.decode == "gpu",
        listing=checkpoint.listing,
    )
    if args.image or args.export:  # no images of the data set are needed: the file gives the number of classes
        names = dataloader.class_names(args.dataset, args.dataset_path, classes)
    else:
        data = load()
        names = data.classes
    model = checkpoint.build(args.model, args.dataset, len(names), **args.model_flags)
    utils.say(f"{checkpoint.path}: {checkpoint.format}")
    if args.image:
        sizes = dict(resize=args.resize, crop=args.crop)
        look = dict(dataset=args.dataset, device=device, mean=args.mean, std=args.std, **sizes)
        read = partial(dataloader.image_files, **look)
        predictions.predict(model, read, names, load, args, device, checkpoint)
    elif args.export:
        exports.write(model, (3, args.crop, args.crop), load, args, device, checkpoint)
    else:
        tasks.evaluate(model, lambda: data, args, device, checkpoint)


if __name__ == "__main__":
    cli.run(main)
