"""Loading images. The public names are those of `dataloader`; this package implements them.

data.py         data sets: `Data`, as batches; `Arrays`, in memory; `Source`, encoded images on disk
batches.py      dividing images into batches, processes, and a held-out part
normalise.py    uint8 pixels to float32, and the usual mean and standard deviation of each data set
classes.py      the names of a data set's classes, and their labels

cifar.py        `cifar`: CIFAR and the embedded digits, whole on the device
memory.py       batches of images in memory, augmented on the device
cifar_files.py  the published files of CIFAR, and .npz files
downloads.py    CIFAR from the internet
digits/         the embedded digits

imagefolder.py  `imagefolder`: ImageNet, or any set of image files
folders.py      images in class folders; shards.py: in tar files; fake.py: generated ones
mapping.py      files that give the class of each image
reading.py      files and folders on disk: which of them count, and the bytes of files
decoding.py     an encoded image to a tensor
workers.py      processes that decode images
processors.py   their default number
disk.py         batches of images on disk, decoded by those processes
files.py        `image_files`: single images as an evaluation sees them
"""
