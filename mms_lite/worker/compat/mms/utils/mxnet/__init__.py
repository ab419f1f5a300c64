"""mms.utils.mxnet: images, scores and sentences with MXNet arrays. mxnet is imported when used."""
