"""Few photographs: networks with pre-trained encoders, and the preparation of colour images."""
