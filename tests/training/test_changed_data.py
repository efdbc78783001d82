"""A resumed run meets other images than it had."""

import shutil

import pytest
from image_folders import save_classes, save_image
from training_runs import TINY, content, rows

from ssprop_fx.cli.app import main

STEPS = 3  # of an epoch of 12 images


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder with images, and a run of 3 epochs that stopped in the second."""
    root = tmp_path_factory.mktemp("stopped")
    save_classes(root / "data" / "train", cat=4, dog=4, owl=4)
    save_classes(root / "data" / "val", cat=1, dog=1, owl=1)
    flags = ["--data-dir", str(root / "data"), "--output", str(root), "--experiment", "run"]
    flags += ["-b", "4", "--epochs", "3", "--max-steps", str(STEPS + 2), "--schedule", "none"]
    assert main([*TINY, *flags, "--no-plot"]) == 0
    return root


@pytest.fixture
def resume(stopped, tmp_path):
    """Resumes a copy of the run on a copy of its images, after `change` has changed those."""
    shutil.copytree(stopped, tmp_path / "copy")

    def resume(change, *flags):
        change(tmp_path / "copy" / "data")
        run = tmp_path / "copy" / "run"
        data = ["--data-dir", str(tmp_path / "copy" / "data"), "--max-steps", "99"]
        return main(["train", "--resume", str(run), *data, *flags]), run

    return resume


def _remove(data):
    for index in range(3):
        (data / "train" / "owl" / f"{index}.png").unlink()


def _add(data):
    for index in range(8):
        save_image(data / "train" / "cat" / f"more{index}.png", "cat")


def _rename_image(data):
    (data / "train" / "cat" / "0.png").rename(data / "train" / "cat" / "new.png")


def _move_image(data):
    (data / "train" / "cat" / "0.png").rename(data / "train" / "dog" / "new.png")


def _remove_validation_image(data):
    shutil.rmtree(data / "val" / "owl")


def _rename_class(data):
    for split in ("train", "val"):
        (data / split / "cat").rename(data / split / "wild cat")


def _add_class(data):
    save_classes(data / "train", ant=4)


def _remove_class(data):
    for split in ("train", "val"):
        shutil.rmtree(data / split / "dog")


CHANGES = {
    _remove: "the train images are not those of the run: 12 then, 9 now",
    _add: "the train images are not those of the run: 12 then, 20 now",
    _rename_image: "the train images are not those of the run: their names differ",
    _move_image: "the train images are not those of the run: cat had 4 and has 3",
    _remove_validation_image: "the validation images are not those of the run: 3 then, 2 now",
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_one_line(resume, capsys, change):
    status, run = resume(change)
    assert status == 2
    err = capsys.readouterr().err
    assert CHANGES[change] in err
    assert "--changed-data" in err
    assert err.count("\n") == 1
    assert content(run / "last.pt")["step"] == STEPS + 2


@pytest.mark.parametrize("change", [_remove, _add])
def test_with_a_flag_the_run_goes_on_and_its_epochs_keep_their_steps(resume, change):
    status, run = resume(change, "--changed-data")
    assert status == 0
    steps = rows(run / "steps.csv")
    assert [int(row["step"]) for row in steps] == list(range(3 * STEPS))
    assert [int(row["epoch"]) for row in steps] == [0] * STEPS + [1] * STEPS + [2] * STEPS
    saved = content(run / "last.pt")
    assert (saved["epoch"], saved["step"]) == (3, 3 * STEPS)
    images = 9 if change is _remove else 20
    assert (saved["data"]["train"]["images"], saved["data"]["steps_per_epoch"]) == (images, STEPS)
    # The images are now those of the run.
    assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_class, "the classes are not those of the run (new: wild cat; gone: cat)"),
        (_add_class, "the classes are not those of the run (new: ant)"),
        (_remove_class, "the classes are not those of the run (gone: dog)"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--changed-data"]])
def test_other_classes_are_always_refused(resume, capsys, change, message, flags):
    status, _ = resume(change, *flags)
    assert status == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_unchanged_folder_may_move(resume):
    status, run = resume(lambda data: None)
    assert status == 0
    assert content(run / "last.pt")["step"] == 3 * STEPS


def test_the_flag_without_resume_is_refused(capsys):
    assert main([*TINY, "--changed-data"]) == 2
    assert "--changed-data is for --resume" in capsys.readouterr().err
