"""Persona likelihoods: an unknown B found by what a character prompt does to each response's likelihood.

    read.readings       likelihoods of the responses under characters of an independent list, and what the model thinks of
                        each response (its mean hidden state)
    score.decided       the score of each row, whether there are two groups, and which rows are flagged
    prompt.written      one inoculation prompt, from the characters that make the flagged responses likely

No SAE, no label and no LLM; the annotator may be a smaller model than the one that is trained.
"""
