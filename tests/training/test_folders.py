"""Folders of images as people have them: the right classes, or one line and exit code 2."""

import os
import shutil

import pytest
from image_folders import classes_of, link, pack, save_classes, save_image
from training_runs import TINY

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import create_datasets

LAYOUTS = {}


def layout(*, train=None, val=None, left_out="", error=""):
    """Register a layout: the images of each class that training sees, or the error.

    Args:
        train: class -> number of training images, in the order of their labels.
        val: the same of the validation images; None is one of each class.
        left_out: text that says what is no image of a class.
        error: text of the error.
    """

    def register(make):
        assert make.__name__ not in LAYOUTS
        LAYOUTS[make.__name__] = (make, train, val, left_out, error)
        return make

    return register


def _both(root, **counts):
    save_classes(root / "train", **counts)
    save_classes(root / "val", **dict.fromkeys(counts, 1))


@layout(train={"cat": 2, "dog": 3})
def plain(root):
    _both(root, cat=2, dog=3)


@layout(train={"cat": 1, "dog": 1})
def classes_in_groups(root):
    save_classes(root / "train" / "animals", cat=1)
    save_classes(root / "train" / "pets", dog=1)
    save_classes(root / "val", cat=1, dog=1)


@layout(train={"cat": 1, "dog": 1})
def one_folder_around_the_classes(root):
    save_classes(root / "train" / "train", cat=1, dog=1)
    save_classes(root / "val", cat=1, dog=1)


@layout(error="2 folders are called images: n01/images, n02/images; a class is one folder")
def tiny_imagenet(root):
    for name in ("n01", "n02"):
        save_image(root / "train" / name / "images" / f"{name}_0.JPEG", name)
    save_classes(root / "val", images=2)


@layout(error="2 folders are called left: cats/left, dogs/left; a class is one folder")
def one_name_under_two_parents(root):
    for parent in ("cats", "dogs"):
        save_classes(root / "train" / parent, left=1)
    save_classes(root / "train" / "dogs", right=1)
    save_classes(root / "val", left=1)


@layout(error="cat holds images, and so does cat/kitten; a class is one folder")
def a_class_in_a_class(root):
    _both(root, cat=1, dog=1)
    save_classes(root / "train" / "cat", kitten=1)


@layout(error="no images found; right would be {root}/train/CLASS/IMAGE.jpg; left out: outside of")
def no_class_folders(root):
    for index in range(3):
        save_image(root / "train" / f"{index}.png", "cat")
    save_classes(root / "val", cat=1, dog=1)


@layout(train={"cat": 1, "dog": 1}, left_out="outside of class folders: 2 (a.png, b.png)")
def images_next_to_the_classes(root):
    _both(root, cat=1, dog=1)
    for name in ("b.png", "a.png"):
        save_image(root / "train" / name, "cat")


@layout(error="all 3 images are of one class, images, and training needs two")
def one_class(root):
    save_classes(root / "train", images=3)
    save_classes(root / "val", images=1)


@layout(
    train={"cat": 1, "dog": 1},
    left_out="not .png or .jpg or .jpeg: 2 (cat/a.webp, cat/b.txt)",
)
def files_of_other_kinds(root):
    _both(root, cat=1, dog=1)
    for name in ("a.webp", "b.txt"):
        (root / "train" / "cat" / name).write_text("")


@layout(train={"cat": 1, "dog": 1}, left_out="folders without images: 1 (owl)")
def a_class_of_other_files(root):
    _both(root, cat=1, dog=1)
    (root / "train" / "owl").mkdir()
    (root / "train" / "owl" / "0.webp").write_text("")


@layout(train={"cat": 1, "dog": 1}, left_out="folders without images: 1 (owl)")
def an_empty_class(root):
    _both(root, cat=1, dog=1)
    (root / "train" / "owl").mkdir()


@layout(
    train={"cat": 1, "dog": 1},
    left_out="hidden: 2 (.ipynb_checkpoints, cat/.ipynb_checkpoints)",
)
def notebooks_leave_folders(root):
    _both(root, cat=1, dog=1)
    save_image(root / "train" / ".ipynb_checkpoints" / "0-checkpoint.png", "cat")
    save_image(root / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", "cat")


@layout(train={"cat": 1, "dog": 1}, left_out="of macOS: 1 (__MACOSX); hidden: 1 (dog/._0.png)")
def an_archive_made_on_a_mac(root):
    _both(root, cat=1, dog=1)
    for path in ("__MACOSX/cat/._0.png", "dog/._0.png"):
        (root / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / path).write_bytes(b"\0\5\x16\7")


@layout(error="{root}/val: Cats, Dogs are not among the training classes, cat, dog")
def no_validation_class_is_known(root):
    save_classes(root / "train", cat=1, dog=1)
    save_classes(root / "val", Cats=1, Dogs=1)


@layout(error="{root}/val: owl is not among the training classes, cat, dog")
def one_validation_class_is_new(root):
    save_classes(root / "train", cat=1, dog=1)
    save_classes(root / "val", cat=1, owl=1)


@layout(error="{root}/test: no images found")
def images_without_labels(root):
    save_classes(root / "train", cat=1, dog=1)
    save_image(root / "test" / "0.png", "cat")


@layout(train={"cat": 1, "dog": 1, "owl": 1}, val={"dog": 2})
def fewer_validation_classes(root):
    save_classes(root / "train", cat=1, dog=1, owl=1)
    save_classes(root / "val", dog=2)


@layout(train={"cat": 1, "dog": 1}, left_out="links to a folder around them: 2 (cat/up, loop)")
def links_in_a_loop(root):
    _both(root, cat=1, dog=1)
    link(root / "train" / "loop", ".")
    link(root / "train" / "cat" / "up", "..")


@layout(train={"cat": 2, "dog": 1})
def a_link_to_a_class_elsewhere(root):
    save_classes(root / "pool", cat=2)
    save_classes(root / "train", dog=1)
    link(root / "train" / "cat", root / "pool" / "cat")
    save_classes(root / "val", cat=1, dog=1)


@layout(train={"cat": 1, "dog": 1}, left_out="broken links or no files: 3 (cat/gone.png, ")
def links_to_nothing_and_a_pipe(root):
    _both(root, cat=1, dog=1)
    link(root / "train" / "cat" / "gone.png", "nowhere.png")
    link(root / "train" / "cat" / "self.png", "self.png")
    os.mkfifo(root / "train" / "cat" / "pipe.png")


@layout(train={"01": 1, "1": 1, "2": 1, "10": 1, "Cat": 1, "cat": 1})
def names_that_sort_alike(root):
    _both(root, **dict.fromkeys(("10", "cat", "1", "Cat", "01", "2"), 1))


@layout(train={"große Katze": 1, "犬": 1})
def names_of_other_languages(root):
    _both(root, **{"große Katze": 1, "犬": 1})


@layout(train={"cat": 2, "dog": 1})
def extensions_in_capitals(root):
    for name in ("0.JPG", "1.Png"):
        save_image(root / "train" / "cat" / name, "cat")
    save_classes(root / "train", dog=1)
    save_classes(root / "val", cat=1, dog=1)


@layout(error="no image of class dog can be read, such as dog/0.jpg: cannot identify image file")
def a_class_of_broken_files(root):
    _both(root, cat=1)
    (root / "train" / "dog").mkdir()
    for index in range(3):
        (root / "train" / "dog" / f"{index}.jpg").write_text("<html>404</html>")


@layout(
    error="--val-split validation: no folder or tar named validation or val or valid or eval or"
    " test in {root}; it has train"
)
def no_validation_images(root):
    save_classes(root / "train", cat=1, dog=1)


@layout(train={"cat": 1, "dog": 1}, left_out="of macOS: 1 (__MACOSX); not .png or .jpg or .jpeg: 1")
def a_tar_with_more_than_images(root):
    _both(root, cat=1, dog=1)
    save_image(root / "train" / "__MACOSX" / "cat" / "0.png", "cat")
    (root / "train" / "cat" / "a.txt").write_text("")
    pack(root / "train")
    shutil.rmtree(root / "train")


@layout(error="2 folders are called images: n01/images, n02/images")
def tiny_imagenet_in_a_tar(root):
    tiny_imagenet(root)
    pack(root / "train")
    shutil.rmtree(root / "train")


@layout(train={"cat": 2, "dog": 1})
def a_tar_of_tars(root):
    save_classes(root / "all", cat=2, dog=1)
    for name in ("cat", "dog"):
        pack(root / "all" / name)
        (root / "train").mkdir(exist_ok=True)
        shutil.move(root / "all" / f"{name}.tar", root / "train")
    pack(root / "train")
    shutil.rmtree(root / "train")
    save_classes(root / "val", cat=1, dog=1)


@layout(error="train.tar: no images found")
def a_tar_without_images(root):
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.txt").write_text("")
    pack(root / "train")
    shutil.rmtree(root / "train")
    save_classes(root / "val", cat=1, dog=1)


@layout(error="train.tar: not a tar, or a damaged one")
def a_tar_that_is_none(root):
    save_classes(root / "val", cat=1, dog=1)
    (root / "train.tar").write_text("<html>404</html>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_has_the_right_classes_or_ends_with_one_line(name, tmp_path, capsys):
    make, train, val, left_out, error = LAYOUTS[name]
    root = tmp_path / "data"
    make(root)
    if error:
        flags = ["--data-dir", str(root), "--output", str(tmp_path / "runs"), "-b", "1"]
        assert main([*TINY, *flags]) == 2
        out, err = capsys.readouterr()
        assert error.format(root=root) in err
        assert (out, err.count("\n")) == ("", 1)
        return
    datasets = create_datasets(TrainConfig(data_dir=str(root)))
    assert list(datasets.classes) == list(train)
    assert classes_of(datasets.train, datasets.classes) == train
    assert classes_of(datasets.validation, datasets.classes) == (val or dict.fromkeys(train, 1))
    told = "; ".join(str(text) for text in datasets.left_out.values() if text)
    assert left_out in told
    assert bool(told) == bool(left_out)


def test_a_run_prints_its_classes_and_what_it_leaves_out(tmp_path, capsys):
    save_classes(tmp_path / "train", cat=2, dog=1, owl=1)
    save_classes(tmp_path / "val", cat=1, owl=2)
    save_image(tmp_path / "train" / "0.png", "cat")
    flags = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "runs"), "-b", "4"]
    flags += ["--schedule", "none", "--epochs", "1", "--no-plot"]
    assert main([*TINY, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train: 4 images, 3 classes: cat 2, dog 1, owl 1" in lines
    assert "validation: 3 images, 2 classes: cat 1, owl 2" in lines
    assert f"left out of {tmp_path / 'train'}: outside of class folders: 1 (0.png)" in lines
