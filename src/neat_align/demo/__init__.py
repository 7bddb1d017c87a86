"""The demo: prompts and tone anchors for a small real model, which modeling/demo_model.py finds.

    rows.py             the prompts, as rows
prompts.jsonl       prompts for training and held out
tone_anchors.jsonl  kind and unkind answers, which the `minilm_tone` reward is fitted to
"""
