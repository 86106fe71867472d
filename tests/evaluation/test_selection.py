"""What --tasks means."""

import pytest

import tasks
from common.errors import UserError
from evaluation.selection import find_task, own_tasks, split_specs
from tasks.problems import Problem


@pytest.mark.parametrize(
    ("texts", "specs"),
    [
        (["world,recall"], ["world", "recall"]),
        (["world", "recall, copying"], ["world", "recall", "copying"]),
        (["arithmetic:digits=3,steps=true,my.jsonl"], ["arithmetic:digits=3,steps=true", "my.jsonl"]),
        (["choices:letters=false,size=0.5,world"], ["choices:letters=false,size=0.5", "world"]),
        (["recall:length=80", "a=b.jsonl,world"], ["recall:length=80", "a=b.jsonl", "world"]),
        (["world,digits=3"], ["world", "digits=3"]),  # an option of no task: no such task
        (["world,world"], ["world"]),
        ([], []),
    ],
)
def test_a_list_of_tasks(texts, specs):
    assert split_specs(texts) == specs


def test_the_name_of_a_file_may_hold_a_comma(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.write_text("", "utf-8")
    assert split_specs([str(path)]) == [str(path)]
    with pytest.raises(UserError, match="names no task"):
        split_specs([","])


def test_a_metric_replaces_that_of_the_task_where_it_fits():
    assert find_task("arithmetic", "exact").metric == "exact" and find_task("arithmetic").metric == "numeric"
    assert find_task("sort:digits=3", "perplexity").metric == "perplexity"
    with pytest.raises(UserError, match="sort:digits=3 scores its answers itself"):
        find_task("sort:digits=3", "contains")


def test_nanos_own_tasks_are_all_but_the_toy_problems():
    names = {task.name for task in own_tasks()}
    assert names == {*tasks.names()} - {*tasks.names(Problem)} and {"world", "recall"} <= names
