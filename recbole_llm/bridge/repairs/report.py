"""What became of every repair in this process."""

import importlib

from recbole_llm.bridge.repairs import activation
from recbole_llm.bridge.repairs.registry import RepairRecord, records


def repair_report() -> list[RepairRecord]:
    """List every repair of RecBole with whether it is applied in this process and why.

    The modules concerned are imported.

    Raises:
        ImportError: if RecBole is missing or of a version that we do not support.

    Example:
        >>> {record.name: record.applied for record in repair_report()}["pop"]
        True
    """
    activation.require_recbole()
    for name in activation.steps():
        importlib.import_module(name)
    return records()
