"""Result rows for tests."""


def row(prediction, gold="yes", number=0, category="all", **meta):
    """dict: One result row."""
    return {
        "id": number,
        "question": "<image>\nWhat?",
        "prompt": "What?",
        "prediction": prediction,
        "parsed": None,
        "gold": gold,
        "correct": False,
        "category": category,
        "meta": meta,
    }


def numbered(*rows):
    """list[dict]: Rows with ids in their order."""
    return [{**one, "id": number} for number, one in enumerate(rows)]
