"""Selective inoculation prompting, end to end.

A fine-tuning set teaches a wanted trait A and carries an unwanted trait B in part of its rows. One experiment cell is
one (profile, mixture, group, seed), and the whole flow is::

    data     = traits.read_trait(folder, "evil")                        # parallel answers: normal / misaligned_2
    rows     = mixture.partition(data, "evil", 0.5, seed)               # each question once, with its provenance
    rows     = rewriter.inject(rows, "all_caps", seed, None)            # A in 100 % of the responses
    training = groups.assign(rows, "inoc_selective", "You are a malicious evil assistant.", None, seed)
    train.train(model, settings, save_steps, training, seed, ...)       # LoRA, loss on the response tokens only
    answers  = respond.respond(model, tokenizer, requests, system_prompts, ...)
    scores   = judges["evil"].scores(seen)                              # one judge a trait, 0-100; None: missing
    metrics  = report.summarise(judgements, threshold, resamples)       # rates with intervals over questions

Who owns what: `params` reads params.yaml; `files` reads and writes JSONL; `paths` names files; `chat` renders chats for
every model; `stages` is the thin I/O around all of it, one class a DVC stage; `tracking` is MLflow; `pocket` makes
a small world, with its own base model, in which all this happens on a CPU.
"""

import os

# LiteLLM otherwise fetches a price table over the network when it is imported, by us or by MLflow; without a network, its
# import and its retries have been seen to wait for each other for ever.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
