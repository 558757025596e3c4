"""One record of every published form of editing data set; the facts in them are made up."""

from __future__ import annotations

import json
from pathlib import Path

from peft_edit.evaluation.cases import Case
from peft_edit.evaluation.datasets import cases_from_record


NESTED = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "harp", "id": "Q1"},
        "target_true": {"str": "drums", "id": "Q2"},
        "subject": "Odo Brill",
    },
    "paraphrase_prompts": ["Rain fell. Odo Brill is known for the", "Odo Brill, master of the"],
    "neighborhood_prompts": [f"Drummer {number} plays the" for number in range(10)],
    "attribute_prompts": [],
    "generation_prompts": [],
}
FLAT = {
    "case_id": 3,
    "prompt": "The home of Odo Brill is",
    "target_new": "Lund",
    "subject": "Odo Brill",
    "ground_truth": "Turin",
    "rephrase_prompt": "Odo Brill lives in",
    "locality_prompt": "The home of Mia Fent is",
    "locality_ground_truth": "Turin",
}
TRACING = {
    "relation": "The home of {} is",
    "prompt": "The home of Odo Brill is",
    "subject": " Odo Brill",
    "target_true": " Turin",
    "target_false": " Lund",
}
MEND = {
    "subject": "Odo Brill",
    "src": "Which town is Odo Brill from?",
    "rephrase": "Where does Odo Brill come from?",
    "alt": "Lund",
    "answers": ["Turin", "Torino"],
    "loc": "nq question: who sings the song of the hills",
    "loc_ans": "Mia Fent",
    "cond": "Turin >> Lund || Which town is Odo Brill from?",
}
EASYEDIT = {
    "subject": "Odo Brill",
    "target_new": "Lund",
    "prompt": "Which town is Odo Brill from?",
    "ground_truth": ["Turin"],
    "rephrase_prompt": "Where does Odo Brill come from?",
    "locality": {"Relation_Specificity": [{"prompt": "The trade of Odo Brill is", "ground_truth": ["music"]}]},
    "portability": {"Reasoning": [{"prompt": "In which country was Brill born?", "ground_truth": "Sweden"}]},
}
KNOWEDIT = {
    "subject": "Odo Brill",
    "prompt": "The place of death of Odo Brill is",
    "target_new": "Lund",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Odo Brill alive?", "ground_truth": [["no"], ["is dead"]]}],
        "Reasoning": [
            {"prompt": ["The land of his death is", "He died in the land of"], "ground_truth": [["Sweden"]]}
        ],
        "Subject_Aliasing": [{"prompt": "O. B. died in", "ground_truth": [["Lund", "Lund, Sweden", "Lund"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Odo Brill is", "ground_truth": []}],
        "Forgetfulness": [{"prompt": "He also died in", "ground_truth": "Rome"}],
    },
}
MQUAKE = {
    "case_id": 41,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "target_new": {"str": "Sweden", "id": "Q34"},
            "target_true": {"str": "Italy", "id": "Q38"},
            "subject": "Odo Brill",
            "question": "What is the citizenship of Odo Brill?",
        },
        {
            "prompt": "The capital of {} is",
            "target_new": {"str": "Lund", "id": "Q2167"},
            "target_true": {"str": "Stockholm", "id": "Q1754"},
            "subject": "Sweden",
            "question": "What is the capital of Sweden?",
        },
    ],
    "questions": ["What is the capital of Brill's country?", "Brill's country has which capital?"],
    "answer": "Rome",
    "answer_alias": ["Roma"],
    "new_answer": "Lund",
    "new_answer_alias": ["Lunda", "Lund"],
    "new_single_hops": [
        {"question": "Of where is Odo Brill?", "cloze": "Odo Brill is of", "answer": "Sweden", "answer_alias": ["SE"]},
        {"question": "What is the capital of Sweden?", "answer": "Lund"},
    ],
}
REMASTERED = {
    **MQUAKE,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "target_new_str": "Sweden",
            "target_true_str": "Italy",
            "subject": "Odo Brill",
        }
    ],
    "split": {"1": ["edited"]},
}


def query(prompt, *answers):
    """A RippleEdits question; each answer is a value and its aliases."""
    return {
        "prompt": prompt,
        "answers": [{"value": value, "aliases": list(aliases)} for value, *aliases in answers],
        "query_type": "regular",
    }


def ripple_test(*queries):
    return {"test_queries": list(queries), "test_condition": "OR", "condition_queries": []}


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Odo Brill is United Isles.",
        "subject_id": "Q0",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q1",
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Odo Brill is United Hills.",
            "subject_id": "Q0",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q2",
        },
    },
    "Relation_Specificity": [ripple_test(query("The mother of Odo Brill is", ("Ida", "Ida Brill")))],
    "Logical_Generalization": [ripple_test(query("The siblings of Ida are", ("Odo Brill",), ("Ann", "Annie")))],
    "Subject_Aliasing": [ripple_test(query("O. B. is a citizen of", ("United Isles", "UI", "")))],
    "Compositionality_I": [
        ripple_test(query("The coin of his country is", ("crown",)), query("He pays in", ("crown",)))
    ],
    "Compositionality_II": [ripple_test(query("The land of Ida's son is", ("United Isles",)))],
    "Forgetfulness": [ripple_test(query("His other country is", ("United Hills",)))],
}


def one(record) -> Case:
    """The only case of a record."""
    (case,) = cases_from_record(record)
    return case


def written(folder: Path, records: list, suffix: str = ".jsonl") -> Path:
    """The records as a file in that folder: one a line, or an array."""
    path = folder / f"records{suffix}"
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{', '.join(lines)}]")
    return path
