"""Ready-made handlers: models served without code, and the classes that users derive their own from.

    from mms_lite.handlers.image_classifier import ImageClassifier

Their modules need numpy and what else they say; they run in workers only.
"""
