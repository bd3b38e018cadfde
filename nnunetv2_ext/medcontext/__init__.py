"""MedContext: learn to segment what is hidden, guided by a moving-average teacher."""
