"""Text: split by file, cut into windows that predict every token once, in an order that hosts share."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from nestnet import data
from nestnet.data import stdlib_text
from nestnet.data.text import Windows, text
from nestnet.data.tokenization import BYTES, Tokenizer, tokenizer
from nestnet.errors import UserError

WORDS = ("one", "two words", "", "three small words", "é")


class Poem:
  """Twenty documents and a test split of two."""

  train = [{"text": f"line {i}: {WORDS[i % 5]}"} for i in range(20)]
  test = [{"text": b"bytes do"}, {"text": "as well"}]


class Short:
  train = [{"text": "abc"}] * 20


class Images:
  train = [{"text": 3}] * 20


class Few:
  train = [{"text": "abc"}] * 9


def poem(length=4):
  return data.load(f"{__name__}:Poem", length=length)


def library(folder):
  """A library of a few files, some of which belong elsewhere."""
  files = {"abc.py": b"import os\n", "json/tool.py": b"\xff\x00 = 1\n", "zip.py": b"", "heapq.py": b"x" * 40,
           "enum.py": b"y" * 40, "notes.txt": b"no", "test/test_abc.py": b"no", "json/tests/t.py": b"no",
           "site-packages/numpy/core.py": b"no", "encodings/cp037.py": b"no", "_sysconfigdata_x.py": b"no",
           "config-3.11-x86/a.py": b"no", "sitecustomize.py": b"no", "pydoc_data/topics.py": b"no"}
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return str(folder)


def test_the_library_without_what_is_not_everywhere(tmp_path):
  found = stdlib_text.documents(library(tmp_path))
  assert [path for path, _ in found] == ["abc.py", "enum.py", "heapq.py", "json/tool.py", "zip.py"]
  assert dict(found)["json/tool.py"] == b"\xff\x00 = 1\n"


def test_files_are_in_one_split_each_whatever_else_there_is(tmp_path):
  found = stdlib_text.documents()
  parts = stdlib_text.splits(found)
  assert sorted(d["text"] for part in parts.values() for d in part) == sorted(content for _, content in found)
  assert all(len(part) > 10 for part in parts.values()) and len(parts["train"]) > 8 * len(parts["test"])
  by_path = {path: stdlib_text.split_of(path) for path, _ in found}
  assert {path: stdlib_text.split_of(path) for path in sorted(by_path, reverse=True)} == by_path
  few = stdlib_text.splits(stdlib_text.documents(library(tmp_path)))
  assert few["test"] == [{"text": b"y" * 40}] and few["validation"] == [{"text": b"x" * 40}]


def test_the_hash_tells_paths_and_contents_apart():
  one = stdlib_text.sha256([("a", b"bc"), ("d", b"")])
  others = [("ab", b"c"), ("d", b"")], [("a", b"bc"), ("d", b" ")], [("a", b"bc")]
  assert one == stdlib_text.sha256((("a", b"bc"), ("d", b"")))
  assert len({one, *map(stdlib_text.sha256, others)}) == 4


def test_the_data_set_says_which_text_it_is():
  dataset = data.load("stdlib_text", length=64)
  sha = stdlib_text.sha256(stdlib_text.documents())
  assert dataset.facts == {"vocab": 256, "sha256": sha} and sha in dataset.about
  train = dataset.split("train")
  assert train.tokens.dtype == np.uint8 and len(train.tokens) > 3e6
  joined = b"".join(b"\0" + content for path, content in stdlib_text.documents()
                    if stdlib_text.split_of(path) == "test") + b"\0"
  assert dataset.split("test").tokens.tobytes() == joined


@pytest.mark.parametrize("length", [1, 4, 7, 27, 28])
def test_every_token_is_predicted_once_from_what_stands_before_it(length):
  documents = [{"text": "abc"}, {"text": ""}, {"text": "de" * 11}]
  (windows,) = text("t", {"train": documents}, length, BYTES).splits.values()
  stream = b"\0abc\0\0" + b"de" * 11 + b"\0"
  assert windows.tokens.tobytes() == stream
  tokens = windows.batch(np.arange(len(windows)))["tokens"]
  assert tokens.shape == (len(windows), length + 1) and tokens.dtype == np.int32
  targets = tokens[:, 1:]
  assert targets[targets >= 0].tolist() == list(stream[1:])
  inputs = tokens[:, :-1][targets >= 0]
  assert inputs.tolist() == list(stream[:-1])
  assert (targets[:-1] >= 0).all()


def test_bytes_of_windows_add_up_to_those_of_the_documents():
  """Of a tokenizer whose tokens are two bytes each, and one for the end of a document."""
  pairs = Tokenizer("pairs", 70_000, 69_999, lambda texts: [np.frombuffer(t, np.uint16) for t in texts], None)
  documents = [{"text": "abcd"}, {"text": "ef" * 10}]
  (windows,) = text("t", {"train": documents}, 5, pairs).splits.values()
  assert windows.tokens.dtype == np.uint32 and len(windows.tokens) == 1 + 2 + 1 + 10 + 1
  found = windows.evaluated(np.arange(len(windows)))
  assert found["bytes"].sum() == pytest.approx(4 + 1 + 20 + 1)
  np.testing.assert_allclose(found["bytes"] / (found["tokens"][:, 1:] >= 0).sum(1), 26 / 14)
  own = text("t", {"train": documents}, 5, BYTES).split("train").evaluated(np.arange(3))
  assert own["bytes"].tolist() == [5, 5, 5]


def test_kept_tokens_are_those_of_the_end_token(tmp_path):
  documents = {"train": [{"text": "abcd"}]}
  for end in (0, 1, 0):
    other = dataclasses.replace(BYTES, end=end)
    tokens = text("t", documents, 2, other, tmp_path).split("train").tokens
    assert tokens.tolist() == [end, *b"abcd", end]


@pytest.mark.parametrize("step", [0, 9])
def test_hosts_make_up_the_global_batch_of_windows(step):
  whole = data.Batches(poem(), batch_size=8, seed=3)[step]["tokens"]
  hosts = [data.Batches(poem(), batch_size=8, seed=3, process_index=i, process_count=2)[step]["tokens"]
           for i in (0, 1)]
  assert [host.shape for host in hosts] == [(4, 5), (4, 5)]
  np.testing.assert_array_equal(np.concatenate(hosts), whole)
  np.testing.assert_array_equal(data.Batches(poem(), batch_size=8, seed=3)[step]["tokens"], whole)
  assert (data.Batches(poem(), batch_size=8, seed=4)[step]["tokens"] != whole).any()


def test_an_epoch_is_every_window_once():
  train = poem().split("train")
  order = data.Batches(poem(), batch_size=len(train))
  stored = train.batch(np.arange(len(train)))["tokens"]
  for epoch in (0, 3):
    read = order[epoch]["tokens"]
    assert (read != stored).any()
    np.testing.assert_array_equal(read[np.lexsort(read.T)], stored[np.lexsort(stored.T)])


def test_an_evaluation_may_take_windows_spread_over_a_split():
  every, count = data.arrays(poem(), "train")["tokens"], len(poem().split("train"))
  some = data.arrays(poem(), "train", 5)
  np.testing.assert_array_equal(some["tokens"], every[[count * i // 5 for i in range(5)]])
  assert some["bytes"].shape == (5,) and len(every) == count > 50
  assert len(data.arrays(poem(), "train", 10 ** 6)["tokens"]) == count


def test_stretches_are_the_middles_of_equal_parts():
  windows = Windows("some/test", np.arange(31), length=8)
  assert windows.stretches(3, 4).tolist() == [[3, 4, 5, 6], [13, 14, 15, 16], [23, 24, 25, 26]]
  # They may be all there is.
  assert windows.stretches(1, 31).tolist() == [list(range(31))]
  for count, tokens in ((0, 4), (2, 0), (8, 4), (1, 32)):
    with pytest.raises(UserError, match=f"some/test has 31 tokens: got {count} stretches of {tokens}"):
      windows.stretches(count, tokens)


def test_own_text_is_held_out_by_document():
  streams = {split: windows.tokens.tobytes().split(b"\0")[1:-1] for split, windows in poem().splits.items()}
  assert streams["test"] == [b"bytes do", b"as well"]
  assert streams["validation"] == [b"line 9: \xc3\xa9", b"line 19: \xc3\xa9"]
  assert len(streams["train"]) == 18


def test_a_tfds_set_with_text(tmp_path):
  with tfds.testing.mock_data(num_examples=30):
    dataset = data.load("imdb_reviews", tmp_path, length=16)
    examples = tfds.builder("imdb_reviews", data_dir=tmp_path).as_data_source("test")
    documents = [example["text"].encode() for example in examples]
  (name,) = {windows.name.rpartition("/")[0] for windows in dataset.splits.values()}
  assert name.startswith("imdb_reviews/") and set(dataset.splits) == {"train", "validation", "test"}
  test = dataset.split("test").tokens
  assert isinstance(test, np.memmap) and test.tobytes() == b"\0" + b"".join(t + b"\0" for t in documents)
  assert test.tobytes().count(b"\0") == 31 and dataset.split("train").tokens.tobytes().count(b"\0") == 28


class Lines(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Text with one split, prepared."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, description="", features=tfds.features.FeaturesDict({
      "text": tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(40):
      yield i, {"text": f"{i} é"}


def test_prepared_text_is_tokenised_once_and_mapped(tmp_path, capsys):
  Lines(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  capsys.readouterr()
  load = lambda: data.load("lines", tmp_path, length=4)
  first = load()
  assert capsys.readouterr().err.count("Tokenising lines/1.0.0/") == 3
  documents = lambda split: set(load().split(split).tokens.tobytes().split(b"\0")) - {b""}
  streams = list(map(documents, ("train", "validation", "test")))
  assert capsys.readouterr().err == ""
  assert sum(map(len, streams)) == 40 and set.union(*streams) == {f"{i} é".encode() for i in range(40)}
  assert (first.split("train").tokens == load().split("train").tokens).all()
  # Half a file is not taken for a whole one.
  (file,) = (tmp_path / "nestnet_tokens").glob("*_test_*.tokens")
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(UserError, match="lines/1.0.0/test: damaged tokens in .* delete .*json to make them"):
    load()
  record = file.with_suffix(".json")
  assert json.loads(record.read_text())["tokens"] == len(first.split("test").tokens)
  record.unlink()
  assert documents("test") == streams[2]


@pytest.mark.parametrize("options, message", [
  ({"name": f"{__name__}:Poem"}, "is text: data.length, .* is missing; allowed is a whole number"),
  ({"name": f"{__name__}:Poem", "length": -1}, "is -1; allowed is a whole number of at least 1"),
  ({"name": f"{__name__}:Short", "length": 9},
   "Short/test: 9 tokens, too few for one window of 9 and the token after it; allowed: .* at most 8"),
  ({"name": f"{__name__}:Images", "length": 4}, "document 0: its text is of type int, allowed: str or bytes"),
  ({"name": f"{__name__}:Few", "length": 4}, r"got train \(9\); needed: train \(10 or more, or a test"),
  ({"name": "ag_news_subset"}, "features .*; needed: image and label, or text"),
  ({"name": "stdlib_texts"}, "unknown data set 'stdlib_texts'; did you mean 'stdlib_text'"),
  ({"name": "digits", "length": 4}, "'digits' has images: data.length=4 is for text; allowed: none"),
  ({"name": f"{__name__}:Poem", "length": 4, "tokenizer": "/no/where"}, "tokenizer: no file /no/where;"),
])
def test_wrong_text(options, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    data.load(options.pop("name"), tmp_path, **options)


@pytest.mark.parametrize("make, message", [
  (lambda: poem().split("tests"), "unknown split of .*Poem 'tests'; did you mean 'test'.*validation"),
  (lambda: data.Batches(poem(), augment=data.augmentation("digits"))[0], "an augmentation is for images"),
  (lambda: stdlib_text.documents("/no/where"), "no .py files in /no/where"),
])
def test_what_text_does_not_have(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_tokenizer_without_its_library_says_so(tmp_path, monkeypatch):
  (tmp_path / "tokenizer.json").write_text("{}")
  monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
  with pytest.raises(UserError, match="needs the library tokenizers, which is not here: pip install"):
    tokenizer(tmp_path)


@pytest.mark.interop
def test_special_tokens_stand_around_prompts_alone(tmp_path):
  import tokenizers
  from tokenizers import models, pre_tokenizers, processors

  made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "ab": 2, "c": 3}))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  made.save(str(tmp_path / "tokenizer.json"))
  found, texts = tokenizer(tmp_path), [b"c ab", b""]
  assert [tokens.tolist() for tokens in found.encode(texts)] == [[3, 2], []]
  assert [tokens.tolist() for tokens in found.encode_prompts(texts)] == [[0, 3, 2], [0]]
  dataset = text("t", {"train": [{"text": "c ab"}]}, 2, found)
  assert dataset.split("train").tokens.tolist() == [1, 3, 2, 1]


@pytest.mark.interop
def test_a_tokenizer_of_hugging_face(tmp_path):
  import tokenizers
  from tokenizers import models, pre_tokenizers

  vocab = {"<unk>": 0, "ab": 1, "c": 2, "</s>": 3, "stop": 300}
  made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  # What a file says of padding and lengths is for batches of its own.
  made.enable_truncation(2)
  made.enable_padding(length=9)
  made.save(str(tmp_path / "tokenizer.json"))
  found = tokenizer(tmp_path)
  assert (found.vocab, found.end) == (301, 3) and found.decode([1, 2]) == "ab c"
  documents = {"train": [{"text": "ab c ab"}, {"text": "c"}]}
  dataset = text("t", documents, 2, found)
  assert dataset.split("train").tokens.tolist() == [3, 1, 2, 1, 3, 2, 3]
  assert dataset.facts == {"vocab": 301, "tokenizer_sha256": found.sha256} and len(found.sha256) == 64
  assert dataset.split("train").bytes_per_token == pytest.approx((7 + 1 + 1 + 1) / 6)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "stop"}}))
  assert tokenizer(tmp_path / "tokenizer.json").end == 300
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "halt"}))
  with pytest.raises(UserError, match="no token that ends a text: looked for halt; allowed is one of its"):
    tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json is damaged or no tokenizer.json"):
    tokenizer(tmp_path)
