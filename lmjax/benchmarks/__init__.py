"""Measurements behind `lmjax bench`; nothing else imports them."""
