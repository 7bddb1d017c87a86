"""Rewards: what scores completions.

Higher is better; `None` abstains; a failure is an error and never a zero.

    protocol.py     what a reward function is (TRL's signature), and what scoring gives back
    resolve.py      names, paths, models and functions to named, weighted reward functions
    scoring.py      reward functions over rows, strictly; their weighted sum
    aggregation.py  several rewards as one number
    calling.py      calling them: on copies, in time, async ones at once; what a failure says
    output.py       what they return, checked
    logged.py       TRL's trainer_state, log_metric and log_extra
    contrast.py     the policy's own opinion: its log-probability under either instruction
    hf.py           a sequence-classification model
    http.py         a reward server, asked over HTTP
    judge.py        a language model behind an OpenAI-compatible endpoint that judges by a rubric
    judge_file.py   a judge's YAML file and its rubric (`rubrics/*.yaml`), checked
    judge_forms.py  scores of answers, pairs in both orders, rankings of groups
    judge_prompts.py   what a judge is asked
    judge_answers.py   reading what it answers, strictly
    judge_client.py    asking it: through the openai package, from the cache, counted, given up on
    judge_cache.py     judgements on the disk
    judge_totals.py    what the judges of a run used in all
    vllm_reward.py  a reward model behind a vLLM server
    vader.py        tone by a lexicon
    minilm_tone.py  tone by a head on sentence embeddings; the demo's second judge
    frozen_model.py    loads the models that judges read their features from
    offensiveness.py   words that people called offensive, by a linear model; no package needed
    harmless_pairs.py  which answer HH-RLHF's raters would call less harmful, by SmolLM2 and a head
    similarity.py      how near an answer is to the data's own, by sentence embeddings
"""
