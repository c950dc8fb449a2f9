"""Finding an unknown B with a sparse autoencoder, before any training (reference section 6).

acts      = features.pool(model, sae, targets, base answers, controls)   # mean latents an example, sparse, on disk
table     = rank.rank(acts)                                  # latents that tell the data from the base model
described = explain.explain(table, corpora)                  # what sets each latent off
classes   = classify.causal / classify.llm                   # yes: explained by A; neutral; no: anything else
prompt    = synthesise.synthesise(descriptions of `no`)
flags     = flag.study / flag.mixture                        # which examples carry the `no` latents
"""
