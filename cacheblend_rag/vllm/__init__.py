"""CacheBlend inside stock vLLM: a KV connector in two halves, one in the scheduler, one in every worker.

    scheduler half   matches warm chunks in a request's token ids, decides, keeps blended KV out of the prefix cache
    worker half      loads, shifts, chooses, recomputes, with the model vLLM has loaded and vLLM's own attention

Nothing of vLLM is patched: ``connector.py`` is the KV connector that vLLM calls. Begin there.
"""
