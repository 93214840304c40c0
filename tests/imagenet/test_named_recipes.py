"""Recipes by name: what `--config` finds without a checkout."""

from pathlib import Path

import pytest

from arsg_dist.imagenet import named_recipes
from arsg_dist.imagenet.cli import recipes_command
from arsg_dist.imagenet.recipe import read_arguments
from tests.support.launchers import REPOSITORY


def test_every_recipe_of_the_checkout_has_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a second copy of the recipes that differs, and a recipe that a wheel lacks."""
    monkeypatch.chdir(tmp_path)
    paths = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert named_recipes.recipe_names() == [path.stem for path in paths]
    for path in paths:
        assert read_arguments(["--config", path.stem]) == read_arguments(["--config", str(path)])


def test_a_file_goes_before_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a user's own file that is silently replaced by the package's recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet_arsg").mkdir()  # of images, say: no recipe
    assert read_arguments(["--config", "imagenet_arsg"]).epochs == 90
    for name in ("digits", "mine.yaml"):
        (tmp_path / name).write_text("epochs: 77\n")
        assert read_arguments(["--config", name]).epochs == 77


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digit", "there is no recipe digit; did you mean digits?"),
        ("imagenet-arsg", "did you mean imagenet_arsg"),
        ("???", "there is no recipe ???; there are cifar10, "),
        ("configs/digits.yaml", "there is no file configs/digits.yaml; --config digits is the recipe of this name"),
        ("configs/mine.yaml", "cannot read configs/mine.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_an_unknown_name_shows_the_nearest(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches "No such file" for what was meant as a name, which does not say what there is."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_arguments(["--config", text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copy_trains_the_same_and_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a user's changed recipe that is overwritten by a second copy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert recipes_command(["copy", "digits", "mine"]) == 0
    assert recipes_command(["copy", "digits"]) == 0
    assert read_arguments(["--config", "mine/digits.yaml"]) == read_arguments(["--config", "digits"])
    (tmp_path / "digits.yaml").write_text("epochs: 77\n")
    capsys.readouterr()
    assert recipes_command(["copy", "digits"]) == 2
    assert "digits.yaml exists already" in capsys.readouterr().err
    assert (tmp_path / "digits.yaml").read_text() == "epochs: 77\n"
    assert recipes_command(["copy", "digitz"]) == 2
    assert "did you mean digits?" in capsys.readouterr().err
    assert recipes_command(["copy", "digits", "nowhere"]) == 2
    assert "there is no directory nowhere" in capsys.readouterr().err


def test_the_list_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a list of bare names, of which a newcomer cannot choose."""
    assert recipes_command([]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["digits"].startswith("The default job: a ResNet-18 learns scikit-learn's handwritten digits")
    assert shown.keys() == set(named_recipes.recipe_names())
