"""Every config we ship loads, and loads again from its own dump."""

import pytest
from mmengine.config import Config

from xtuner_ext.cli import config_names, configs_dir
from xtuner_ext.cli.config_options import load_config


@pytest.mark.parametrize("name", sorted(config_names()))
def test_config_survives_a_dump(name, tmp_path):
    config = load_config(config_names()[name])
    config.dump(tmp_path / "dumped.py")
    again = Config.fromfile(tmp_path / "dumped.py")
    for key in ("work_dir", "train_cfg", "param_scheduler", "model", "train_dataloader"):
        assert key in again
    assert again.work_dir == config.work_dir
    iterations = config.train_cfg.get("max_iters")
    assert again.train_cfg.get("max_iters") == iterations and (iterations or config.train_cfg.max_epochs)
    # A length in epochs is known when training starts.
    assert iterations is None or config.param_scheduler[-1].end == iterations
    assert config.work_dir.startswith("work_dirs/")


def test_no_two_configs_share_a_work_dir():
    folders = [load_config(path).work_dir for path in config_names().values()]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize("name", [name for name in sorted(config_names()) if "/stage" in name])
def test_a_stage_has_its_recipes_settings_and_no_other(name):
    """Updating a config merges dictionaries; what one recipe leaves out would be another's."""
    recipes = Config.fromfile(str(configs_dir() / "mmmamba" / "_base_" / "recipes.py"))
    model = load_config(config_names()[name]).model
    reference = "reference" in name or name.startswith("mmmamba/hovle/stage")
    recipe = "reference" if reference else "windowed" if "smollm2" in name else "improved"
    assert model.mixer == recipes[f"{recipe}_mixer"]
    assert model.seeding == recipes[f"{recipe}_seeding"]
    loss, other = ("alignment", "divergence") if model.stage < 3 else ("divergence", "alignment")
    source = "improved" if recipe == "windowed" and loss == "divergence" else recipe
    assert model[loss] == recipes[f"{source}_{loss}"] and other not in model
    # The paper's.
    assert not reference or load_config(config_names()[name]).optim_wrapper.clip_grad.max_norm == 5.0
