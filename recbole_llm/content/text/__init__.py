"""Texts of items and users: an atomic file is read, its text columns are chosen, and a template makes a sentence of them."""

from recbole_llm.content.text.atomic_files import AtomicTable, atomic_header, read_atomic_table
from recbole_llm.content.text.columns import choose_text_fields
from recbole_llm.content.text.template import Template, TextReport, default_template, render_texts, texts_of_tokens

__all__ = [
    "AtomicTable",
    "Template",
    "TextReport",
    "atomic_header",
    "choose_text_fields",
    "default_template",
    "read_atomic_table",
    "render_texts",
    "texts_of_tokens",
]
