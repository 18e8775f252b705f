"""The tables of docs/circuits.md are what the configuration says; `python tests/test_circuit_docs.py` writes them."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from trainer.config.cells_section import section_classes
from trainer.config.circuits import CircuitsConfig, StageConfig
from trainer.config.messages import inner_section

PAGE = ROOT / "docs" / "circuits.md"
BEGIN = "<!-- generated from the code by `python tests/test_circuit_docs.py`; do not edit -->"
END = "<!-- end of what is generated -->"


def table():
    lines = ["| key | what it is | default |", "|---|---|---|"]
    for section in section_classes(CircuitsConfig):
        place = section.place or ("stages[]" if section is StageConfig else "")
        for name, field in section.model_fields.items():
            inner = inner_section(field.annotation)
            if inner in section_classes(CircuitsConfig) and field.default is not None:
                continue  # a section in itself, whose keys follow
            made = field.get_default(call_default_factory=True)
            default = json.dumps(made.model_dump() if hasattr(made, "model_dump") else made)
            key = f"{place}.{name}".lstrip(".")
            text = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{key}` | {text} | `{default}` |")
    return "\n".join(lines)


def with_table(text):
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def test_the_table_of_keys_is_what_the_configuration_says():
    text = PAGE.read_text()
    assert BEGIN in text and END in text
    assert text == with_table(text), "out of date; write it again: python tests/test_circuit_docs.py"


def test_every_section_and_key_is_in_the_table():
    text = table()
    for section in section_classes(CircuitsConfig):
        for name in section.model_fields:
            place = section.place or ("stages[]" if section is StageConfig else "")
            key = f"{place}.{name}".lstrip(".")
            assert any(f"| `{key}{end}" in text for end in ("`", ".", "[")), key


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
