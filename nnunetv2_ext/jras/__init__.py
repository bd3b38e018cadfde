"""J-RAS: a segmenter and a retriever trained jointly; each patch is segmented with guides from the training cases."""
