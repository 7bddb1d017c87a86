"""The demo: a small real model (located, not shipped), and prompts and tone anchors that are.

    model.py            SmolLM2-135M-Instruct, which modeling/demo_model.py finds
    rows.py             the prompts, as rows
prompts.jsonl       prompts for training and held out
tone_anchors.jsonl  kind and unkind answers, which the `minilm_tone` reward is fitted to
"""
