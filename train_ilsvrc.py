"""Train a network on ImageNet (ILSVRC2012), or on any folder of images with train/ and val/.

    python3 train_ilsvrc.py --dataset_path=<path> --model=ResNet34_DoubleShared --shared_rank=48 --visible_device=0,1

Several visible GPUs share each batch; `--parallel=process` gives each its own process, as does
`torchrun --nproc_per_node=4 train_ilsvrc.py ...`, on one machine or many. `--dataset_path=fake` tries everything out on
generated images.
"""

import startup

with startup.importing(__name__):
    import dataloader
    import engine
    import utils
    from engine import cli, flags, run_images
    from models import create_model, create_objective
    from models.teachers import Teacher
    from reporting import run_report

SCRIPT = cli.Script(
    __doc__,
    datasets=("ilsvrc",),
    model="ResNet34_DoubleShared",
    training=True,
    defaults=dict(epochs=150, lr_steps="60:0.1,100:0.01,140:0.001", weight_decay=1e-4),
    add_flags=(flags.add_image_folder, flags.add_image_training),
)


def main(argv=None):
    args = cli.parse(SCRIPT, argv)
    device = engine.start_device(args.visible_device, args.parallel)
    cli.complete(args, device)
    cli.check_network(args, args.crop)
    utils.seed_everything(args.seed, args.deterministic)
    objective = create_objective(args.model, args.dataset, **args.objective_flags)
    recipe = engine.Recipe.of(args)
    engine.check(objective, recipe, device)
    teacher = Teacher.of(objective, args.dataset)
    data = dataloader.imagefolder(
        args.dataset_path,
        args.batch_size,
        device,
        workers=args.workers,
        resize=args.resize,
        crop=args.crop,
        scale=(args.min_scale, 1.0),
        jitter=args.color_jitter,
        subset=args.subset,
        valid=run_images.held_out(args),
        seed=args.seed,
        mean=args.mean,
        std=args.std,
        cache=args.cache,
        on_device=args.decode == "gpu",
        listing=args.checkpoint and args.checkpoint.listing,
    )
    model = create_model(args.model, args.dataset, len(data.classes), **args.model_flags)
    model.made_for = model.made_for.updated(vars(args))
    if teacher:
        objective.teacher = teacher.build(model, data.classes)
    if args.checkpoint:
        args.checkpoint.load_into(model, args.new_head)
        args.model_flags = dict(model.built_as.flags)  # weights of another project may need one more
    folder = args.save or f"checkpoint/{cli.folder_name(args)}"
    run = engine.Run(folder, cli.all_flags(args), args.resume, cli.default_flags(SCRIPT, args))
    utils.say(f"{args.model} on {data.source}; {engine.devices_in_words()}; run in {run.folder}")
    engine.fit(model, objective, data, run, recipe, device, args.checkpoint)
    run_report.of_run(model, data, run)
    run.close()


if __name__ == "__main__":
    cli.run(main)
