"""Chats and pictures to prompts, against the checkpoint's own processor."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from eureka_megatron.data.dataset import load_dataset
from eureka_megatron.data.processor import Processor
from eureka_megatron.data.prompts import SYSTEM_PROMPTS
from eureka_megatron.data.samples import training_sample
from eureka_megatron.demo.forms import FORMS, build_published
from eureka_megatron.demo.tiny import SPECIAL_TOKENS
from eureka_megatron.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build_published(tmp_path_factory.mktemp("tiny"), weights=False)


@pytest.fixture(scope="module")
def processor(model_dir):
    return Processor(model_dir, min_pixels=28 * 28, max_pixels=200 * 28 * 28)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chat(*parts: str | Image.Image, folder=None) -> list[dict]:
    content = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            part.save(folder / f"{number}.png")
            content.append({"type": "image", "image": f"{number}.png"})
    return [{"role": "user", "content": content}]


def test_prompt_equals_the_checkpoints_own_processor(processor, model_dir, tmp_path):
    pictures = [noise(84, 84), noise(200, 61, 1)]
    message = chat("Look:", pictures[0], "and", pictures[1], "How many circles are there?", folder=tmp_path)
    prompt = processor.prompt(message, id="a", answer="3", folders=[tmp_path])
    assert prompt.text.count("<|image_pad|>") == 2
    reference = AutoProcessor.from_pretrained(model_dir)
    shown = [picture.image for picture in prompt.pictures]
    expected = reference(text=[prompt.text], images=shown, return_tensors="pt")
    np.testing.assert_array_equal(prompt.tokens_S, expected["input_ids"][0].numpy())
    assert [picture.grid_thw for picture in prompt.pictures] == [
        tuple(grid) for grid in expected["image_grid_thw"].tolist()
    ]
    # The reference processor, its own resize included, leaves our pictures as they are: the patches are equal, reordered.
    start = 0
    for picture, offset in zip(prompt.pictures, prompt.picture_offsets, strict=True):
        patches = expected["pixel_values"][start : start + len(picture.patches_PD)]
        units = patches.reshape(-1, 4, patches.shape[-1])[torch.from_numpy(picture.unit_order_U)]
        torch.testing.assert_close(picture.patches_PD, units.reshape(patches.shape), rtol=0, atol=0)
        assert (prompt.tokens_S[offset : offset + picture.units] == processor.image_token_id).all()
        assert prompt.tokens_S[offset - 1] != processor.image_token_id
        start += len(patches)
    assert start == len(expected["pixel_values"])
    assert prompt.next_position == prompt.positions_3S.max() + 1


def test_the_records_of_a_picture_fit_each_other(processor):
    picture = processor.picture(noise(300, 190))
    frames, height, width = picture.grid_thw
    assert picture.image.size == (width * 14, height * 14)
    assert picture.units == frames * height * width // 4
    assert picture.patches_PD.shape == (frames * height * width, 3 * 2 * 14 * 14)
    assert picture.coordinates_P2.shape == (len(picture.patches_PD), 2)
    assert picture.window_lengths_W.sum() == picture.frame_lengths_F.sum() == len(picture.patches_PD)


def test_equal_pixels_have_equal_keys(processor):
    assert processor.picture(noise(84, 84)).key == processor.picture(noise(84, 84)).key
    assert processor.picture(noise(84, 84)).key != processor.picture(noise(84, 84, 1)).key
    assert processor.picture(noise(56, 112)).key != processor.picture(noise(112, 56)).key


@pytest.mark.parametrize("size", [(1, 1), (5, 900), (28, 28), (84, 84), (3000, 40), (1999, 1501), (27, 29)])
def test_a_resized_picture_lies_within_bounds_and_is_not_resized_again(processor, size):
    picture = processor.picture(noise(*size))
    assert 28 * 28 <= picture.image.width * picture.image.height <= 200 * 28 * 28
    assert processor.picture(picture.image).image.size == picture.image.size
    assert picture.image.width % 28 == picture.image.height % 28 == 0


def test_extreme_pictures_are_refused(processor):
    with pytest.raises(UserError, match=r"'thin.png' is 401×2: more than 200 times"):
        processor.picture(noise(401, 2), "thin.png")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_pixels": 100}, "min_pixels=100 is below the checkpoint's own bound, 784"),
        ({"max_pixels": 10**9}, "max_pixels=1000000000 is above the checkpoint's own bound"),
        ({"min_pixels": 784, "max_pixels": 700}, "less than one vision token"),
        ({"system_prompt": "mm_eureka_7B"}, "did you mean 'mm_eureka_7b'"),
    ],
)
def test_impossible_settings_are_refused(model_dir, bounds, message):
    with pytest.raises(ConfigError, match=message):
        Processor(model_dir, **bounds)


def test_bounds_without_a_size_between_them_are_refused(model_dir):
    processor = Processor(model_dir, min_pixels=4 * 784, max_pixels=4 * 784)
    assert processor.picture(noise(56, 56)).image.size == (56, 56)
    with pytest.raises(ConfigError, match="too close"):
        processor.picture(noise(84, 28))


def test_a_directory_that_is_no_checkpoint_is_refused(model_dir, tmp_path):
    with pytest.raises(UserError, match=r"config.json does not exist"):
        Processor(tmp_path)
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        Processor(tmp_path)


def test_a_prompt_without_pictures(processor):
    prompt = processor.prompt(
        json.dumps([{"role": "user", "content": "How many circles are there?"}]), origin="x.jsonl:3"
    )
    assert prompt.pictures == ()
    assert prompt.picture_offsets == ()
    np.testing.assert_array_equal(prompt.positions_3S, np.tile(np.arange(len(prompt.tokens_S)), (3, 1)))
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompt.origin == "x.jsonl:3"


def test_a_named_system_prompt_takes_the_place_of_the_rows_own(model_dir):
    processor = Processor(model_dir, system_prompt="mm_eureka_7b", min_pixels=784)
    message = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = processor.prompt(message).text
    assert SYSTEM_PROMPTS["mm_eureka_7b"] in text
    assert "Be brief." not in text
    assert r"$\\boxed{2}$ </answer>" in text  # MM-EUREKA's own two backslashes


def test_placeholders_written_as_text_are_refused(processor, tmp_path):
    message = chat(noise(84, 84), "what is <|image_pad|>?", folder=tmp_path)
    with pytest.raises(UserError, match=r"^d.jsonl:7: the text has 2 <|image_pad|> for 1 pictures"):
        processor.prompt(message, folders=[tmp_path], origin="d.jsonl:7")


def test_a_prompt_that_is_too_long_is_refused(model_dir, tmp_path):
    processor = Processor(model_dir, min_pixels=784, max_prompt_tokens=30)
    with pytest.raises(UserError, match=r"the prompt has 36 tokens; data\.max_prompt_tokens=30"):
        processor.prompt(chat(noise(84, 84), "How many circles are there?", folder=tmp_path), folders=[tmp_path])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no JSON", "not JSON"),
        ("[]", "non-empty list of turns"),
        ({"role": "user"}, "found an object"),
        ([{"role": "user"}], "needs the keys role and content"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": 3}], "must be a string or a list of parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has no address"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "neither text nor picture nor video"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "must end with a user's turn"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "system turn that is not the first"),
    ],
)
def test_messages_that_are_no_chat_are_refused(processor, message, reason):
    with pytest.raises(UserError, match=reason):
        processor.prompt(message, origin="d.jsonl:1")


def test_a_response_closes_with_the_end_token_and_reads_back(processor):
    text = "<think>circles 3</think><answer>\\boxed{3}</answer>"
    tokens_R = processor.encode_response(text)
    assert tokens_R[-1] == processor.end_token_id
    assert processor.decode(tokens_R) == text


@pytest.mark.parametrize(
    "end",
    [
        "<|im_end|>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<|im_end|><|endoftext|>",
        "<|im_end|>\n<|im_end|> <|endoftext|>\n\n",
    ],
)
def test_a_response_with_an_end_token_of_its_own_gets_no_second_one(processor, end):
    np.testing.assert_array_equal(
        processor.encode_response("circles 3\n" + end), processor.encode_response("circles 3\n")
    )


@pytest.mark.parametrize("text", ["", " \n", "<|im_end|>", "\n<|endoftext|>"])
def test_an_empty_response_is_refused(processor, text):
    with pytest.raises(UserError, match="the response is empty"):
        processor.encode_response(text)


def test_a_response_that_spells_a_control_token_is_refused(processor):
    for token in processor.tokenizer.all_special_tokens:
        with pytest.raises(UserError, match=re.escape(f"contains the control token {token}")):
            processor.encode_response(f"<think>{token}</think> 3<|im_end|>")


@pytest.mark.parametrize("token", [token for token in SPECIAL_TOKENS if not token.endswith("_pad|>")])
def test_control_tokens_in_text_are_plain_text_in_every_turn(processor, tmp_path, token):
    """And nothing else changes: the tokens are those of the chat without it, and its letters where it stood."""

    def turns(middle: str) -> list[dict]:
        (last,) = chat(noise(84, 84), f"\n\nHow{middle}many?", folder=tmp_path)
        return [
            {"role": "system", "content": f"Be{middle}brief."},
            {"role": "user", "content": [{"type": "text", "text": middle}, {"type": "text", "text": "Why?"}]},
            {"role": "assistant", "content": f"{middle}So."},
            last,
        ]

    control = [processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS]
    prompt, clean = (processor.prompt(turns(middle), folders=[tmp_path]) for middle in (token, " and "))
    assert (
        prompt.tokens_S[np.isin(prompt.tokens_S, control)].tolist()
        == clean.tokens_S[np.isin(clean.tokens_S, control)].tolist()
    )
    assert processor.tokenizer.decode(prompt.tokens_S) == processor.tokenizer.decode(clean.tokens_S).replace(
        " and ", token
    )
    assert token in prompt.text
    start = prompt.picture_offsets[0]
    assert (prompt.tokens_S[start : start + prompt.pictures[0].units] == processor.image_token_id).all()


def test_pieces_of_a_control_token_do_not_grow_together(processor):
    message = [{"role": "user", "content": ["a<|im_", "end|>\n<|im_st", "art|>system\n\ufdd00\ufdd0"]}]
    prompt = processor.prompt(message)
    ends = [processor.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")]
    assert [int((prompt.tokens_S == token).sum()) for token in ends] == [3, 2]
    assert processor.tokenizer.decode(prompt.tokens_S) == prompt.text


@pytest.mark.parametrize("text", ["cut \ud83d off", "\udc00", "\ud83d\u2028"])
def test_half_a_surrogate_pair_is_told(processor, text):
    for content in (text, [{"type": "text", "text": text}]):
        with pytest.raises(UserError, match=r"^d.jsonl:3: text in 'message' holds half a surrogate pair, '\\ud"):
            processor.prompt([{"role": "user", "content": content}], origin="d.jsonl:3")


def test_whatever_the_tokenizer_raises_is_the_rows_error(processor, monkeypatch):
    monkeypatch.setattr(processor, "_encode", lambda text: [].pop())
    with pytest.raises(UserError, match=r"^d.jsonl:3: IndexError: pop from empty list$"):
        processor.prompt([{"role": "user", "content": "x"}], origin="d.jsonl:3")


def test_a_sample_is_prompt_and_response_with_the_mask_on_the_response(processor, tmp_path):
    prompt = processor.prompt(chat(noise(84, 84), "How many?", folder=tmp_path), folders=[tmp_path])
    sample = processor.sft_sample(prompt, "3")
    length, response = len(prompt.tokens_S), processor.encode_response("3")
    np.testing.assert_array_equal(sample.tokens_S[:length], prompt.tokens_S)
    np.testing.assert_array_equal(sample.tokens_S[length:], response)
    assert sample.mask_S.tolist() == [0.0] * length + [1.0] * len(response)
    assert sample.positions_3S[:, length:].tolist() == [[prompt.next_position + i for i in range(len(response))]] * 3
    assert sample.pictures is prompt.pictures
    assert sample.rollout_logprobs_S is None
    rollout = training_sample(prompt, response, advantage=-0.5, logprobs_R=np.full(len(response), -1.5, np.float32))
    assert rollout.advantages_S.tolist() == [0.0] * length + [-0.5] * len(response)
    assert rollout.rollout_logprobs_S.tolist() == [0.0] * length + [-1.5] * len(response)
    with pytest.raises(ValueError, match="1 log-probabilities for 2 tokens"):
        training_sample(prompt, np.array([1, 2]), logprobs_R=np.zeros(1, np.float32))


def test_vision_tokens_to_ban_are_the_four(processor):
    names = processor.tokenizer.convert_ids_to_tokens(list(processor.vision_token_ids))
    assert set(names) == {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"}


# --- forms of published directories ---


def changed(model_dir, tmp_path, name, **values):
    """The checkpoint with keys of one of its files changed; ... takes one out."""
    directory = tmp_path / "changed"
    shutil.copytree(model_dir, directory)
    found = json.loads((directory / name).read_text()) | values
    (directory / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return directory


@pytest.mark.parametrize("form", FORMS)
def test_every_form_renders_and_cuts_pictures_alike(model_dir, tmp_path, form):
    directory = build_published(tmp_path / "hf", form, weights=False)
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "How many circles?"}],
        }
    ]
    Image.fromarray(np.full((60, 90, 3), 7, dtype=np.uint8)).save(tmp_path / "x.png")
    expected, found = (
        Processor(one, min_pixels=784, max_pixels=28 * 784).prompt(message, folders=[tmp_path])
        for one in (model_dir, directory)
    )
    assert found.text == expected.text
    np.testing.assert_array_equal(found.tokens_S, expected.tokens_S)
    assert torch.equal(found.pictures[0].patches_PD, expected.pictures[0].patches_PD)


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        (
            {"min_pixels": ..., "max_pixels": ..., "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
            (3136, 12845056),
        ),
        (
            {"min_pixels": ..., "max_pixels": ..., "size": {"min_pixels": 3136, "max_pixels": 12845056}},
            (3136, 12845056),
        ),
        ({"min_pixels": 3136, "max_pixels": 12845056, "size": None}, (3136, 12845056)),
    ],
)
def test_picture_bounds_have_several_spellings(model_dir, tmp_path, values, bounds):
    directory = changed(model_dir, tmp_path, "preprocessor_config.json", **values)
    processor = Processor(directory, min_pixels=None, max_pixels=None)
    assert (processor.min_pixels, processor.max_pixels) == bounds


def test_templates_by_name_and_none_at_all(model_dir, tmp_path):
    template = json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    directory = changed(model_dir, tmp_path, "tokenizer_config.json", chat_template=named)
    message = [{"role": "user", "content": "Why?"}]
    texts = [Processor(one, min_pixels=784).prompt(message).text for one in (directory, model_dir)]
    assert texts[0] == texts[1]
    shutil.rmtree(directory)
    with pytest.raises(UserError, match="has no chat template: neither"):
        Processor(changed(model_dir, tmp_path, "tokenizer_config.json", chat_template=...))


def test_templates_in_a_folder_of_their_own(model_dir, tmp_path):
    template = json.loads((model_dir / "tokenizer_config.json").read_text())["chat_template"]
    directory = changed(model_dir, tmp_path, "tokenizer_config.json", chat_template=...)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text(template)
    with pytest.raises(UserError, match=r"has no default chat template, only others by name: rag$"):
        Processor(directory, min_pixels=784)
    (directory / "chat_template.jinja").write_text(template)
    assert Processor(directory, min_pixels=784).ends.reasons


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] ", r"TemplateSyntaxError, line 1: unexpected end"),
        ("{{ messages | nope }}", r"No filter named 'nope'"),
        ("{{ messages[0].nothing.at_all }}", r"UndefinedError"),
        ("{{ raise_exception('roles must dance') }}", r"roles must dance"),
    ],
)
def test_a_template_that_cannot_be_applied_names_its_file(model_dir, tmp_path, template, reason):
    directory = shutil.copytree(model_dir, tmp_path / "changed")
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(
        UserError, match=f"chat_template.jinja: the chat template cannot be applied: .*{reason}"
    ) as told:
        Processor(directory, min_pixels=784)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("chat_template.json", "{", "chat_template.json is not valid JSON"),
        ("chat_template.json", "[]", "chat_template.json must hold a JSON object, found list"),
        ("chat_template.json", "{}", "chat_template.json has no key chat_template"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("generation_config.json", "{", "generation_config.json is not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "generation_config.json: eos_token_id: 'x' is no token"),
    ],
)
def test_a_broken_file_is_named(model_dir, tmp_path, name, text, reason):
    directory = shutil.copytree(model_dir, tmp_path / "changed")
    (directory / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        Processor(directory, min_pixels=784)


def test_pictures_cut_for_another_tower_are_refused(model_dir, tmp_path):
    with pytest.raises(UserError, match=r"image_processor has patch_size 16; vision_config in config.json has 14"):
        Processor(changed(model_dir, tmp_path, "preprocessor_config.json", patch_size=16))


# --- where a response ends ---


def ends_of(directory, text, generation=..., tokenizer=..., config=...):
    """A checkpoint that names these ends and whose template is this; ... leaves one as it is, None sets null."""
    for name, key, value in (
        ("generation_config.json", "eos_token_id", generation),
        ("tokenizer_config.json", "eos_token", tokenizer),
        ("config.json", "eos_token_id", config),
    ):
        path = directory / name
        values = json.loads(path.read_text())
        if value is not ...:
            values[key] = value
        if name == "tokenizer_config.json" and text is not ...:
            values["chat_template"] = text
        path.write_text(json.dumps(values))
    return Processor(directory, min_pixels=784)


def test_the_templates_end_counts_whatever_the_files_name(model_dir, tmp_path):
    """A base model's directory, in which nothing but the template speaks of <|im_end|>."""
    directory = shutil.copytree(model_dir, tmp_path / "base")
    text_end, turn_end = (SPECIAL_TOKENS.index(name) for name in ("<|endoftext|>", "<|im_end|>"))
    first = Processor(model_dir, min_pixels=784).tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    text_end, turn_end = first + text_end, first + turn_end
    processor = ends_of(directory, ..., generation=text_end, tokenizer="<|endoftext|>", config=text_end)
    assert list(processor.ends.reasons) == [turn_end, text_end]
    assert processor.end_token_id == turn_end
    assert processor.encode_response("3<|im_end|>\n<|endoftext|>")[-2:].tolist() == [*processor._encode("3"), turn_end]
    assert processor.describe_ends() == (
        f"a response ends with <|im_end|> ({turn_end}: closes an assistant's turn in the chat template of tokenizer_config.json) or <|endoftext|> "
        f"({text_end}: eos_token of the tokenizer, eos_token_id of generation_config.json, eos_token_id of config.json)"
    )


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + ' END' }}{% endfor %}"


@pytest.mark.parametrize("form", ["{{ m.content }}", "{{ m.content[0].text }}", "{{ m.content | trim }}\n "])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "</answer>", "{{ eos_token }}"])
def test_any_token_may_close_a_turn(model_dir, tmp_path, form, end):
    directory = shutil.copytree(model_dir, tmp_path / "changed")
    processor = ends_of(directory, "{% for m in messages %}A: " + form + end + "\n{% endfor %}", tokenizer="<|im_end|>")
    expected = "<|im_end|>" if end.startswith("{") else end
    assert processor.tokenizer.convert_ids_to_tokens(processor.end_token_id) == expected


def test_a_template_without_an_end_leaves_it_to_the_files_or_is_refused(model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "changed")
    processor = ends_of(directory, PLAIN)
    assert "closes" not in processor.describe_ends()
    assert processor.end_token_id == processor.tokenizer.eos_token_id
    with pytest.raises(UserError, match="nothing says where a response ends"):
        ends_of(directory, PLAIN, generation=None, tokenizer=None, config=None)


def test_an_end_that_is_no_token_of_the_model_is_passed_over_and_told(model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "changed")
    processor = ends_of(directory, ..., generation=[-1, 99999])
    assert not {-1, 99999} & processor.ends.reasons.keys()
    assert "99999 (eos_token_id of generation_config.json) is no token of the model" in processor.describe_ends()


def test_a_token_that_the_embedding_has_no_row_for_is_refused(model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "more")
    tokenizer = AutoProcessor.from_pretrained(model_dir).tokenizer
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<|loc_{number}|>" for number in range(rows)])
    tokenizer.save_pretrained(directory)
    processor = Processor(directory, min_pixels=784)
    last = rows - len(processor.tokenizer) + rows - 1  # of the tokens added, the one in the embedding's last row
    assert processor.encode_response(f"<|loc_{last}|>")[0] == rows - 1
    message = [{"role": "user", "content": f"<|loc_{last + 1}|>"}]
    for use in (lambda: processor.encode_response(message[0]["content"]), lambda: processor.prompt(message)):
        with pytest.raises(UserError, match=rf"token <\|loc_{last + 1}\|> is number {rows}, .* has {rows} rows"):
            use()

    rows_file = tmp_path / "rows.jsonl"
    good = {"message": [{"role": "user", "content": "one"}], "answer": "1", "response": "two"}
    bad = [good | {"response": f"<|loc_{last + 1}|>"}, good | {"message": message}]
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in (good, *bad)))
    with pytest.raises(UserError, match=rf"rows.jsonl:2: token <\|loc_{last + 1}\|> .*\n.*rows.jsonl:3: token"):
        load_dataset(
            rows_file, processor, response_key="response"
        )  # when the data are opened, not when a row's turn comes


def test_a_class_name_that_transformers_gave_up_is_told_with_the_one_to_write(model_dir, tmp_path):
    directory = changed(
        model_dir, tmp_path, "preprocessor_config.json", image_processor_type="Qwen2_5_VLImageProcessor"
    )
    with pytest.raises(
        UserError, match=r"says image_processor_type 'Qwen2_5_VLImageProcessor', .* write 'Qwen2VLImageProcessor' there"
    ):
        Processor(directory)


def test_lengths_are_known_without_decoding(processor, tmp_path):
    """By sizes alone, for pictures of every shape, turned by their EXIF, narrowed by their row, and texts that spell control tokens."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(90, 500).save(tmp_path / "turned.jpg", exif=exif)
    pictures = [noise(*size) for size in ((28, 28), (31, 450), (700, 300), (57, 58))]
    narrowed = {"type": "image", "image": str(tmp_path / "turned.jpg"), "max_pixels": 20 * 28 * 28}
    messages = [
        chat("no picture, <|im_end|>"),
        *[chat(picture, "one", folder=tmp_path) for picture in pictures],
        chat(*pictures, "several", folder=tmp_path),
        [{"role": "user", "content": [narrowed, {"type": "image", "image": str(tmp_path / "turned.jpg")}]}],
    ]
    for message in messages:
        found = processor.length(message, folders=[tmp_path])
        assert found == len(processor.prompt(message, folders=[tmp_path]).tokens_S)
