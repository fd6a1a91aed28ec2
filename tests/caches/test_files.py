"""Files of activations: what is damaged, foreign or missing is said with the file and the place; old ones load."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nicehooks import ActivationCache, NiceHooksError, TreeMismatch
from nicehooks.errors import FileFault, FileMissing

X = torch.arange(6.0).reshape(2, 3)

DAMAGED: dict[str, tuple[str, str]] = {
    "no JSON": ("not json", "is damaged: its entry 'nicehooks' is no JSON (JSONDecodeError)."),
    "no end": ("[" * 5000, "is damaged: its entry 'nicehooks' is no JSON"),
    "a list": ("[]", "is damaged: its entry 'nicehooks' is no mapping of paths to values."),
    "a number": ("3", "is damaged: its entry 'nicehooks' is no mapping of paths to values."),
    "a value that is none": ('{"h.0": {"value": {"x": 1}}}', "is damaged at 'h.0': no value is written like this."),
    "no code": ('{"h.0": ["tuple", 3]}', "is damaged at 'h.0': no value is written like this."),
    "a number for a code": ('{"value": {"x": 1}, "h.0": 3}', "is damaged at 'value': no value is written like this."),
    "two kinds": ('{"h.0": {"tuple": [], "list": []}}', "is damaged at 'h.0': no value is written like this."),
    "another kind": ('{"h.0": {"set": []}}', "is damaged at 'h.0': no value is written like this."),
    "a number for a tuple": ('{"h.0": {"tuple": 3}}', "is damaged at 'h.0': no value is written like this."),
    "text for a list": ('{"h.0": {"list": "ab"}}', "is damaged at 'h.0': no value is written like this."),
    "no pairs": ('{"h.0": {"dict": [[1, 2, 3]]}}', "is damaged at 'h.0': no value is written like this."),
    "a key that is none": ('{"h.0": {"dict": [[[], {"value": 1}]]}}', "is damaged at 'h.0': no value is written like"),
    "no tensor": ('{"h.0": {"tensor": "h.1"}}', "is damaged at 'h.0': its tensor 'h.1' is missing."),
    "a number for a name": ('{"h.0": {"tensor": []}}', "is damaged at 'h.0': no value is written like this."),
    "far too deep": (
        '{"h.0": ' + '{"list": [' * 900 + "]}" * 900 + "}",
        "is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_said_with_the_file_and_the_place(tmp_path: Path, case: str) -> None:
    metadata, said = DAMAGED[case]
    file = tmp_path / "broken.safetensors"
    save_file({"h.0": X}, file, metadata={"nicehooks": metadata})
    with pytest.raises(FileFault) as caught:
        ActivationCache.load(file)
    assert str(caught.value).startswith(f"{str(file)!r} {said}")


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    ActivationCache({"h.0": (X, None)}).save(file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(FileFault, match=r"a\.safetensors"):
            ActivationCache.load(file)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": 1}), b"\xff" * 64, b"PK\x03\x04" + b"\0" * 40])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "foreign"
    file.write_bytes(content)
    with pytest.raises(FileFault, match="foreign' cannot be read: it is damaged, or is no safetensors file"):
        ActivationCache.load(file)


def test_a_file_that_is_not_there_is_one_of_our_errors_and_pythons(tmp_path: Path) -> None:
    for error in (FileMissing, NiceHooksError, FileNotFoundError):
        with pytest.raises(error, match="nothing' cannot be read: there is no such file"):
            ActivationCache.load(tmp_path / "nothing")
    with pytest.raises(FileMissing) as caught:
        ActivationCache({"a": X}).save(tmp_path / "nowhere" / "a")
    folder = str(tmp_path / "nowhere")
    assert str(caught.value) == f"{folder + '/a'!r} cannot be written: there is no folder {folder!r}."


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileFault, match="cannot be read"):
        ActivationCache.load(tmp_path)
    with pytest.raises(FileFault, match="cannot be written"):
        ActivationCache({"a": X}).save(tmp_path)


@pytest.mark.parametrize("value", [X.to_sparse(), (X, [torch.nested.nested_tensor([X, X], layout=torch.jagged)])])
def test_a_tensor_that_cannot_be_saved_is_said_with_its_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TreeMismatch, match=r"^'h\.0.*' holds a (Sparse|Nested)Tensor\[.*, which cannot be saved"):
        ActivationCache({"h.0": value}).save(tmp_path / "a")


OLD_PICKLE = """
gASVsQUAAAAAAACMFW5pY2Vob29rcy5hY3RpdmF0aW9uc5SMD0FjdGl2YXRpb25DYWNoZZSTlF2UKIwHMEBpbnB1dJSMDm5pY2Vob29rcy5zZWVulIwFQ2
FsbHOUk5QpgZQojBNuaWNlaG9va3MuYXJndW1lbnRzlIwJQXJndW1lbnRzlJOUKYGUjAVpbnB1dJSMDHRvcmNoLl91dGlsc5SMEl9yZWJ1aWxkX3RlbnNv
cl92MpSTlCiMDXRvcmNoLnN0b3JhZ2WUjBBfbG9hZF9mcm9tX2J5dGVzlJOUQgMBAACAAooKbPycRvkgaqhQGS6AAk3pAy6AAn1xAChYEAAAAHByb3RvY2
9sX3ZlcnNpb25xAU3pA1gNAAAAbGl0dGxlX2VuZGlhbnECiFgKAAAAdHlwZV9zaXplc3EDfXEEKFgFAAAAc2hvcnRxBUsCWAMAAABpbnRxBksEWAQAAABs
b25ncQdLBHV1LoACKFgHAAAAc3RvcmFnZXEAY3RvcmNoCkZsb2F0U3RvcmFnZQpxAVgOAAAAOTQ1MTM4Njg1MTM2MzJxAlgDAAAAY3B1cQNLAk50cQRRLo
ACXXEAWA4AAAA5NDUxMzg2ODUxMzYzMnEBYS4CAAAAAAAAAAAAgD8AAIA/lIWUUpRLAEsBSwKGlEsCSwGGlImMC2NvbGxlY3Rpb25zlIwLT3JkZXJlZERp
Y3SUk5QpUpR0lFKUc2gLKYGUaA1oEChoE0IDAQAAgAKKCmz8nEb5IGqoUBkugAJN6QMugAJ9cQAoWBAAAABwcm90b2NvbF92ZXJzaW9ucQFN6QNYDQAAAG
xpdHRsZV9lbmRpYW5xAohYCgAAAHR5cGVfc2l6ZXNxA31xBChYBQAAAHNob3J0cQVLAlgDAAAAaW50cQZLBFgEAAAAbG9uZ3EHSwR1dS6AAihYBwAAAHN0
b3JhZ2VxAGN0b3JjaApGbG9hdFN0b3JhZ2UKcQFYDgAAADk0NTEzODY3ODE1MTY4cQJYAwAAAGNwdXEDSwJOdHEEUS6AAl1xAFgOAAAAOTQ1MTM4Njc4MT
UxNjhxAWEuAgAAAAAAAAAAAIA/AACAP5SFlFKUSwBLAUsChpRLAksBhpSJaBspUpR0lFKUc2WGlIwBMJRoBymBlChoEChoE0IDAQAAgAKKCmz8nEb5IGqo
UBkugAJN6QMugAJ9cQAoWBAAAABwcm90b2NvbF92ZXJzaW9ucQFN6QNYDQAAAGxpdHRsZV9lbmRpYW5xAohYCgAAAHR5cGVfc2l6ZXNxA31xBChYBQAAAH
Nob3J0cQVLAlgDAAAAaW50cQZLBFgEAAAAbG9uZ3EHSwR1dS6AAihYBwAAAHN0b3JhZ2VxAGN0b3JjaApGbG9hdFN0b3JhZ2UKcQFYDgAAADk0NTEzODY3
OTg2MjI0cQJYAwAAAGNwdXEDSwJOdHEEUS6AAl1xAFgOAAAAOTQ1MTM4Njc5ODYyMjRxAWEuAgAAAAAAAAB06Ea/KNKSPZSFlFKUSwBLAUsChpRLAksBhp
SJaBspUpR0lFKUaBAoaBNCAwEAAIACigps/JxG+SBqqFAZLoACTekDLoACfXEAKFgQAAAAcHJvdG9jb2xfdmVyc2lvbnEBTekDWA0AAABsaXR0bGVfZW5k
aWFucQKIWAoAAAB0eXBlX3NpemVzcQN9cQQoWAUAAABzaG9ydHEFSwJYAwAAAGludHEGSwRYBAAAAGxvbmdxB0sEdXUugAIoWAcAAABzdG9yYWdlcQBjdG
9yY2gKRmxvYXRTdG9yYWdlCnEBWA4AAAA5NDUxMzg2ODAwNzc3NnECWAMAAABjcHVxA0sCTnRxBFEugAJdcQBYDgAAADk0NTEzODY4MDA3Nzc2cQFhLgIA
AAAAAAAAdOhGvyjSkj2UhZRSlEsASwFLAoaUSwJLAYaUiWgbKVKUdJRSlGWGlGWFlFKULg==
"""
OLD_FILE = """
GAIAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJuaWNlaG9va3MiOiJ7XCIwQGlucHV0XCI6IHtcImNhbGxzXCI6IFt7XCJkaWN0XCI6IFtbXCJpbnB1dFwiLC
B7XCJ0ZW5zb3JcIjogXCIwQGlucHV0WzBdWydpbnB1dCddXCJ9XV19LCB7XCJkaWN0XCI6IFtbXCJpbnB1dFwiLCB7XCJ0ZW5zb3JcIjogXCIwQGlucHV0
WzFdWydpbnB1dCddXCJ9XV19XX0sIFwiMFwiOiB7XCJjYWxsc1wiOiBbe1widGVuc29yXCI6IFwiMFswXVwifSwge1widGVuc29yXCI6IFwiMFsxXVwifV
19fSJ9LCIwQGlucHV0WzBdWydpbnB1dCddIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOlswLDhdfSwiMEBpbnB1dFsx
XVsnaW5wdXQnXSI6eyJkdHlwZSI6IkYzMiIsInNoYXBlIjpbMSwyXSwiZGF0YV9vZmZzZXRzIjpbOCwxNl19LCIwWzBdIjp7ImR0eXBlIjoiRjMyIiwic2
hhcGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOlsxNiwyNF19LCIwWzFdIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsxLDJdLCJkYXRhX29mZnNldHMiOlsy
NCwzMl19fSAgICAgIAAAgD8AAIA/AACAPwAAgD906Ea/KNKSPXToRr8o0pI9
"""


def test_pickles_of_before_load() -> None:
    """Written when the cache, the calls and the arguments were defined in other modules."""
    acts = pickle.loads(base64.b64decode(OLD_PICKLE))
    assert type(acts) is ActivationCache
    assert list(acts) == ["0@input", "0"]
    assert [call["input"].tolist() for call in acts.calls("0@input")] == [[[1.0, 1.0]]] * 2
    assert [call.shape for call in acts.calls("0")] == [(1, 2)] * 2


def test_files_of_before_load(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.write_bytes(base64.b64decode(OLD_FILE))
    acts = ActivationCache.load(file)
    assert [call["input"].tolist() for call in acts.calls("0@input")] == [[[1.0, 1.0]]] * 2
    again = tmp_path / "again"
    acts.save(again)
    assert structure(again) == structure(file)


def structure(file: Path) -> Any:
    """What a file says of how its tensors nest."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["nicehooks"])
