"""Finding an unknown B with a sparse autoencoder, before any training (reference section 6).

    features.pool_examples    mean latents of every example's target, base response and control, as sparse rows on disk
    rank.moments, component   which latents tell the data from the base model (`rank.table`), by the study's and our ranking
    explain.strongest         what sets each latent off; `describe` or `describe_with_llm` puts it into words
    classify.causal, with_llm    `yes`: explained by A; `neutral`; `no`: anything else
    flag.study, component     which examples carry the `no` latents
    synthesise.by_likelihood, with_llm    one inoculation prompt from them
    page.write                all of it for a person to read

Nothing here reads provenance; the stages (`inoculation.stages.detect`) compare the flags with it afterwards.
"""
