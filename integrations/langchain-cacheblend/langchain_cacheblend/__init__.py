"""CacheBlend for LangChain: a model, a vector store and a retriever around one ``cacheblend_rag`` engine."""

from langchain_cacheblend.chat_models import ChatCacheBlend
from langchain_cacheblend.consistency import RepairReport, VerifyReport
from langchain_cacheblend.llms import CacheBlendLLM
from langchain_cacheblend.retrievers import CacheBlendRetriever
from langchain_cacheblend.vectorstores import CacheBlendVectorStore

__all__ = [
    "CacheBlendLLM",
    "CacheBlendRetriever",
    "CacheBlendVectorStore",
    "ChatCacheBlend",
    "RepairReport",
    "VerifyReport",
]
