import functools
import sys

import pytest

from trainer.config import RunConfig
from trainer.dotted import SIZES, bind_arguments, check_dotted_paths, resolve
from trainer.errors import ConfigError


class Network:
    class Inner:
        def build(self):
            pass

    def __init__(self, width, depth=2, *, dropout=0.0):
        pass


class Open:
    def __init__(self, width, **kwargs):
        pass


class OwnConfig:
    def __init__(self, vocab_size, n_technical_batches, width=3):
        pass


class Configured:
    def __init__(self, settings, extra=1):
        pass


class ConfiguredWithSize:
    def __init__(self, settings, vocab_size):
        pass


def make_loader(path, batch_size=8, seed=0, rank=0, world_size=1):
    pass


def make_optimizer(params, model, lr):
    pass


def positional(a, /, b):
    pass


partial_network = functools.partial(Network, depth=5)
just_a_number = 3

MODULE = __name__


def run_config(**updates):
    raw = {
        "run_name": "tiny",
        "model": {"model_class": f"{MODULE}.Network", "model_args": {"width": 3}},
        "optimizer": {"optimizer_class": f"{MODULE}.make_optimizer", "optimizer_args": {"lr": 0.1}},
        "datasets": [{"dataloader_factory": f"{MODULE}.make_loader", "dataloader_args": {"path": "x"}}],
        "gradient_accumulation_steps": 1,
    }
    return RunConfig.model_validate({**raw, **updates})


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Return a function that writes a user's module and makes it importable."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path.relative_to(tmp_path).parts[0].removesuffix(".py"))
        return path

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in written]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "path",
    [
        f"{MODULE}.Network",
        f"{MODULE}:Network",
        f"{MODULE}.Network.Inner.build",
        f"{MODULE}:Network.Inner.build",
    ],
)
def test_both_spellings_of_a_dotted_path_resolve(path):
    expected = Network.Inner.build if path.endswith("build") else Network
    assert resolve(path, "model.model_class") is expected


def test_a_module_wins_over_an_attribute_of_its_package_that_shadows_it(user_module):
    user_module("shadowed_pkg/__init__.py", "from shadowed_pkg.train import train\n")
    user_module("shadowed_pkg/train.py", "def train(): pass\ndef other(): pass\n")
    assert resolve("shadowed_pkg.train.other", "x").__name__ == "other"
    assert resolve("shadowed_pkg:train", "x").__name__ == "train"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "collections.OrderedDictt",
            r"model\.model_class: .*collections has no 'OrderedDictt'; did you mean 'OrderedDict'",
        ),
        ("collections:OrderedDictt", r"collections has no 'OrderedDictt'; did you mean 'OrderedDict'"),
        ("collections.OrderedDict.popp", r"OrderedDict has no 'popp'; did you mean 'pop'"),
        ("email.mim.text", r"email has no 'mim'; did you mean 'mime'"),
        ("email.mim:text", r"email has no 'mim'; did you mean 'mime'"),
        (
            "nosuchpackage.module.Name",
            r"there is no module 'nosuchpackage'; modules are looked for in the current folder",
        ),
        ("nosuchpackage.module:Name", r"there is no module 'nosuchpackage'"),
    ],
)
def test_a_path_that_names_nothing_is_told_with_the_nearest_name(path, message):
    with pytest.raises(ConfigError, match=message):
        resolve(path, "model.model_class")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nimport nosuchlibrary\n", r"No module named 'nosuchlibrary' \(.*mine\.py, line 2\)"),
        ("x = 1\n\nraise RuntimeError('no card')\n", r"RuntimeError: no card \(.*mine\.py, line 3\)"),
        ("def f(:\n    pass\n", r"SyntaxError: invalid syntax \(.*mine\.py, line 1\)"),
        (
            "from collections import Nothing\n",
            r"ImportError: cannot import name 'Nothing'.*mine\.py, line 1\)",
        ),
        ("import json\njson.loads('')\n", r"JSONDecodeError: .*mine\.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(.*mine\.py, line 2\)"),
    ],
)
@pytest.mark.parametrize("spelling", ["mine.Model", "mine:Model"])
def test_a_module_that_fails_to_import_shows_the_real_reason(user_module, text, message, spelling):
    user_module("mine.py", text)
    with pytest.raises(ConfigError, match=r"importing mine failed: .*" + message):
        resolve(spelling, "model.model_class")


def test_a_package_that_fails_to_import_a_part_when_asked_for_it_shows_the_real_reason(user_module):
    user_module("lazy_pkg/__init__.py", "def __getattr__(name):\n    import nosuchlibrary\n")
    message = r"importing lazy_pkg.Model failed: .*No module named 'nosuchlibrary' \(.*__init__\.py, line 2\)"
    with pytest.raises(ConfigError, match=message):
        resolve("lazy_pkg.Model", "model.model_class")


def test_a_failing_submodule_is_not_mistaken_for_a_missing_one(user_module):
    user_module("ours_pkg/__init__.py", "")
    user_module("ours_pkg/nets.py", "import ours_pkg.missing\n")
    with pytest.raises(
        ConfigError, match=r"importing ours_pkg\.nets failed: .*No module named 'ours_pkg\.missing'"
    ):
        resolve("ours_pkg.nets.Model", "model.model_class")


@pytest.mark.parametrize(
    ("target", "arguments", "options"),
    [
        (Network, {"width": 3, "dropout": 0.1}, {}),
        (Network, {}, {"provided": ("width",)}),
        (Network, {}, {"leading": 1}),
        (Open, {"width": 1, "anything": 2}, {}),
        (partial_network, {"width": 1, "depth": 2}, {}),
        (dict, {"anything": 1}, {}),
        (positional, {"b": 1}, {"leading": 1}),
        (make_loader, {"path": "x"}, {"provided": ("rank", "world_size", "facts")}),
    ],
)
def test_arguments_that_fit_are_accepted(target, arguments, options):
    bind_arguments(target, arguments, "x", **options)


@pytest.mark.parametrize(
    ("target", "arguments", "options", "message"),
    [
        (
            Network,
            {"width": 3, "dropuot": 1},
            {},
            r"^x\.dropuot: Network takes no such argument; did you mean 'dropout'\?$",
        ),
        (
            Network,
            {"width": 3, "zzz": 1},
            {},
            r"x\.zzz: Network takes no such argument; allowed: width, depth, dropout",
        ),
        (Network, {}, {}, r"^x\.width: is required by Network$"),
        (Network, {"width": 3}, {"leading": 1}, r"x\.width: Network gets this from the trainer; remove it"),
        (Open, {}, {}, r"x\.width: is required by Open"),
        (partial_network, {}, {}, r"x\.width: is required by partial"),
        (positional, {"b": 1}, {}, r"positional takes a by position only"),
        (lambda: None, {}, {"leading": 1}, r"takes 0 positional arguments; the trainer passes 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(target, arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        bind_arguments(target, arguments, "x", **options)


def test_a_config_whose_paths_and_arguments_fit_passes():
    paths = check_dotted_paths(run_config())
    assert paths == [f"{MODULE}.Network", f"{MODULE}.make_optimizer", f"{MODULE}.make_loader"]


def test_optimizers_and_schedulers_of_torch_pass():
    optimizer = {
        "optimizer_class": "torch.optim.AdamW",
        "optimizer_args": {"lr": 0.1, "betas": [0.9, 0.95]},
        "scheduler_class": "torch.optim.lr_scheduler:StepLR",
        "scheduler_args": {"step_size": 3},
    }
    assert len(check_dotted_paths(run_config(optimizer=optimizer))) == 4


def test_sizes_that_follow_from_the_data_need_not_be_given():
    model = {"model_class": f"{MODULE}.Configured", "config_class": f"{MODULE}.OwnConfig"}
    check_dotted_paths(run_config(model=model))


@pytest.mark.parametrize("size", SIZES)
def test_any_size_that_data_tells_may_be_required_by_a_model(user_module, size):
    user_module("sized.py", f"def build({size}): ...\n")
    check_dotted_paths(run_config(model={"model_class": "sized.build"}))


def test_with_a_config_class_the_sizes_go_into_the_config_only():
    model = {"model_class": f"{MODULE}.ConfiguredWithSize", "config_class": f"{MODULE}.OwnConfig"}
    with pytest.raises(
        ConfigError, match=r"model\.model_args\.vocab_size: is required by ConfiguredWithSize"
    ):
        check_dotted_paths(run_config(model=model))


def test_a_loader_factory_is_given_ranks_by_the_trainer_only():
    phase = {
        "dataloader_factory": f"{MODULE}.make_loader",
        "dataloader_args": {"path": "x", "seed": 3, "rank": 1},
    }
    with pytest.raises(
        ConfigError, match=r"datasets\.0\.dataloader_args\.rank: the trainer gives this"
    ) as error:
        check_dotted_paths(run_config(datasets=[phase]))
    assert "seed" not in str(error.value)


def test_something_that_cannot_be_called_is_refused():
    with pytest.raises(
        ConfigError, match=r"model\.model_class: .*just_a_number is of type int; name a class or a function"
    ):
        check_dotted_paths(run_config(model={"model_class": f"{MODULE}.just_a_number"}))
    with pytest.raises(ConfigError, match=r"loss\.loss_class: xml\.etree is a module; name a class"):
        check_dotted_paths(run_config(loss={"loss_class": "xml.etree"}))


def test_all_mistakes_in_dotted_paths_are_told_together():
    config = run_config(
        model={
            "model_class": f"{MODULE}.Configured",
            "config_class": f"{MODULE}.OwnConfig",
            "config_args": {"widht": 2},
        },
        optimizer={
            "optimizer_class": "torch.optim.Adam",
            "optimizer_args": {"params": 1},
            "scheduler_class": "torch.optim.X",
        },
        loss={"loss_class": f"{MODULE}.Network"},
        datasets=[
            {"dataloader_factory": "nosuch.module.x"},
            {
                "dataloader_factory": f"{MODULE}.make_loader",
                "validation": {
                    "dataloader_factory": f"{MODULE}.make_loader",
                    "dataloader_args": {"pth": "x"},
                },
            },
        ],
    )
    with pytest.raises(ConfigError) as error:
        check_dotted_paths(config)
    for expected in (
        "8 mistakes",
        "model.config_args.widht: OwnConfig takes no such argument; did you mean 'width'?",
        "optimizer.optimizer_args.params: Adam gets this from the trainer; remove it",
        "optimizer.scheduler_class: torch.optim.X: torch.optim has no 'X'",
        "loss.loss_args.width: is required by Network",
        "datasets.0.dataloader_factory: nosuch.module.x: there is no module 'nosuch'",
        "datasets.1.dataloader_args.path: is required by make_loader",
        "datasets.1.validation.dataloader_args.pth: make_loader takes no such argument; did you mean 'path'?",
        "datasets.1.validation.dataloader_args.path: is required by make_loader",
    ):
        assert expected in str(error.value)
