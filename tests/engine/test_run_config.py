"""The configuration of a run, from the files and --set of a command line."""

import json
from types import SimpleNamespace

import pytest

from common.config import parse_overrides
from common.errors import UserError
from engine.run_config import load_run

RUN = {"dataset_path": [["a.bin", "b.bin"]], "max_steps": 1000}


def load_from(folder, model="{}", overrides=()):
    """Write the two files, and load them with these values of --set."""
    args = SimpleNamespace(config=folder / "run.json", model=folder / "model.json")
    args.set = parse_overrides(overrides)
    args.config.write_text(json.dumps(RUN)), args.model.write_text(model)
    return load_run(args)


def refusal(*args, **options):
    with pytest.raises(UserError) as info:
        load_from(*args, **options)
    return str(info.value)


def test_overrides_reach_the_file_that_has_the_key(tmp_path):
    run, model = load_from(tmp_path, '{"n_layer": 2}', ["batch_size=8", "n_head=2", "dropout=0.1"])
    assert (run.batch_size, run.max_steps, run.dropout) == (8, 1000, 0.1)
    assert (model.n_layer, model.n_head) == (2, 2)
    _, model = load_from(tmp_path, overrides=["architecture=nanochat"])
    assert model.architecture == "nanochat"


def test_a_model_that_still_names_the_dropout_of_its_run(tmp_path):
    load_from(tmp_path, '{"dropout": 0.1}', ["dropout=0.1"])
    told = refusal(tmp_path, '{"dropout": 0.1}')
    assert 'model.json: key "dropout" belongs to the run: remove it here' in told


def test_a_run_without_data(train):
    done = train("pretrain", dataset_path=[])
    assert done.returncode == 2 and "dataset_path is empty: give at least one" in done.stderr


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("batchsize=8", '--set: unknown key "batchsize"; did you mean "batch_size"?'),
        ("n_heads=8", '--set: unknown key "n_heads"; did you mean "n_head"?'),
        ("n_head=0", '--set: key "n_head": found 0; needs an integer >= 1'),
        ("architecture=gpt5", '--set: key "architecture": found "gpt5"; needs one of "nano"'),
        ('rope_scaling={"rope_type":"yarn"}', '--set: key "rope_scaling": its key "factor": field required'),
        ("rope_scaling=4", '--set: key "rope_scaling": found 4; needs a JSON object whose "rope_type"'),
        ('rope_scaling={"rope_type":"linear"}', '--set: key "rope_scaling": found {"rope_type": "linear"}'),
    ],
)
def test_wrong_overrides_of_a_run(tmp_path, assignment, sentence):
    assert refusal(tmp_path, overrides=[assignment]).startswith(sentence)


def test_an_unknown_architecture(tmp_path):
    told = refusal(tmp_path, '{"architecture": ["nano"]}')
    assert 'model.json: key "architecture": found ["nano"]; needs one of "nano"' in told
