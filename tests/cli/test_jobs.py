"""Prompts become jobs: seeds, sizes, hashes, prompt files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.cli.jobs import Job, check_calls, make_jobs, slug
from dit_attn.errors import DitAttnError


def test_item_i_gets_the_seed_plus_i():
    jobs = make_jobs({"prompt": ["a", "b"], "seed": 5, "num_images_per_prompt": 2}, {})
    assert [(job.index, job.prompt, job.seed) for job in jobs] == [(0, "a", 5), (1, "a", 6), (2, "b", 7), (3, "b", 8)]


def test_flags_override_the_defaults_of_the_model():
    (job,) = make_jobs({"prompt": ["a"], "steps": 3, "height": 64}, {"height": 128, "num_inference_steps": 20, "x": 1})
    assert job.call == {"height": 64, "num_inference_steps": 3, "x": 1}


def test_pipeline_kwargs_have_the_last_word():
    (job,) = make_jobs({"prompt": ["a"], "height": 64, "pipeline_kwargs": {"height": 96, "eta": 0.5}}, {})
    assert job.call == {"height": 96, "eta": 0.5}


def test_a_txt_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa cat\r\n\n  a dog  \n")
    jobs = make_jobs({"prompts": str(path), "prompt": ["first"]}, {})
    assert [job.prompt for job in jobs] == ["first", "a cat", "a dog"]
    assert jobs[2].where.endswith("p.txt, line 3")


def test_a_jsonl_line_sets_its_own_seed_and_size(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "a", "seed": 9, "height": 64, "num_inference_steps": 2},
        {"prompt": "b", "pipeline_kwargs": {"eta": 1}},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    first, second = make_jobs({"prompts": str(path), "height": 32, "seed": 1}, {})
    assert (first.seed, first.call) == (9, {"height": 64, "num_inference_steps": 2})
    assert (second.seed, second.call) == (2, {"height": 32, "eta": 1})


def test_a_csv_file_leaves_out_empty_cells(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,seed,num-frames\n"a, b",7,\nc,,9\n')
    first, second = make_jobs({"prompts": str(path)}, {})
    assert (first.prompt, first.seed, first.call) == ("a, b", 7, {})
    assert (second.prompt, second.seed, second.call) == ("c", 43, {"num_frames": 9})


def test_a_picture_of_a_line_is_beside_the_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "image": "cat.png"}')
    (job,) = make_jobs({"prompts": str(path)}, {})
    assert job.call["image"] == str(tmp_path / "cat.png")
    path = tmp_path / "p.csv"
    path.write_text('prompt,image,pipeline_kwargs\na,cat.png,"{""mask_image"": ""m.png"", ""strength"": 0.5}"\n')
    (job,) = make_jobs({"prompts": str(path), "pipeline_kwargs": {"mask_image": "of-the-flag.png"}}, {})
    assert job.call == {"image": str(tmp_path / "cat.png"), "mask_image": str(tmp_path / "m.png"), "strength": 0.5}
    (job,) = make_jobs({"prompt": ["a"], "pipeline_kwargs": {"mask_image": "of-the-flag.png"}}, {})
    assert job.call["mask_image"] == "of-the-flag.png"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "no prompt in it"),
        ("p.txt", "\n \n", "no prompt in it"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("p.jsonl", '["a"]', "line 1 must be an object"),
        ("p.jsonl", '{"promt": "a"}', "line 1: 'promt'. Did you mean 'prompt'"),
        ("p.jsonl", '{"seed": 3}', "line 1 has no prompt"),
        ("p.jsonl", '{"prompt": 3}', "prompt in .* line 1 must be text"),
        ("p.jsonl", '{"prompt": " "}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "height": "tall"}', "height in .* line 1 must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed in .* line 1 must be"),
        ("p.csv", "text,seed\na,1\n", "line 1 must name the columns"),
        ("p.csv", "prompt,prompt\na,b\n", "line 1 names the column 'prompt' twice"),
        ("p.csv", "prompt,seed\na,1\nb\n", "line 3 has another number of columns"),
        ("p.csv", "prompt,seed\na,1,2\n", "line 2 has another number of columns"),
        ("p.csv", 'prompt\n"a\n', "is not CSV"),
        ("p.csv", "prompt,seed\na,x\n", "seed in .* line 2 must be a whole number"),
        ("p.csv", "prompt,seed\n", "no prompt in it"),
        ("p.csv", "", "no prompt in it"),
        ("p.doc", "a", "must end in .txt, .jsonl, .csv"),
    ],
)
def test_a_bad_prompt_file_is_refused_with_the_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DitAttnError, match=message) as error:
        make_jobs({"prompts": str(path)}, {})
    assert "\n" not in str(error.value)


def test_a_prompt_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(DitAttnError, match="No such file"):
        make_jobs({"prompts": str(tmp_path / "none.txt")}, {})
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DitAttnError, match="not UTF-8"):
        make_jobs({"prompts": str(tmp_path / "b.txt")}, {})


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=100))
def test_a_slug_is_always_a_short_file_name(text):
    name = slug(text)
    assert name
    assert len(name) <= 40 and len(name.encode()) <= 120
    assert not set(name) & set('/\\:*?"<>|\0\n ')
    assert not name.startswith((".", "-"))


def test_a_slug_keeps_whole_words_of_any_script():
    assert slug("A large RED circle, at the left on white!") == "a-large-red-circle-at-the-left-on-white"
    assert slug("一只猫 在草地上") == "一只猫-在草地上"
    assert slug("!!!") == "item"


def test_the_hash_changes_with_everything_that_decides_the_output(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"1")
    job = Job(0, "a", 1, {"height": 64, "image": str(picture)})
    digests = {
        job.digest({"model": "m"}),
        Job(0, "b", 1, job.call).digest({"model": "m"}),
        Job(0, "a", 2, job.call).digest({"model": "m"}),
        Job(0, "a", 1, {**job.call, "height": 32}).digest({"model": "m"}),
        job.digest({"model": "n"}),
    }
    picture.write_bytes(b"2")
    digests.add(job.digest({"model": "m"}))
    assert len(digests) == 6


def test_the_hash_does_not_depend_on_position_or_source():
    assert Job(0, "a", 1, {}, "--prompt").digest({}) == Job(7, "a", 1, {}, "p.txt, line 3").digest({})


class Pipeline:
    """A call that takes anything, as some pipelines do: unknown names must be refused all the same."""

    def __call__(self, prompt, height=None, eta=0.0, generator=None, **kwargs):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_frames": 3}, "Pipeline takes no num_frames; leave out --num-frames"),
        ({"num_inference_steps": 3}, "leave out --steps"),
        ({"image": "x"}, "takes no image"),
        ({"etaa": 1}, "'etaa'. Did you mean 'eta'"),
        ({"generator": 1}, "use --seed"),
        ({"output_type": "pil"}, "set by this command"),
    ],
)
def test_arguments_the_pipeline_does_not_take_are_refused(call, message):
    with pytest.raises(DitAttnError, match=message):
        check_calls([Job(0, "a", 1, call)], Pipeline)


def test_arguments_the_pipeline_takes_pass():
    check_calls([Job(0, "a", 1, {"height": 3, "eta": 0.1})], Pipeline)
