"""Measurements for `lmjax bench`; nothing else imports them."""
