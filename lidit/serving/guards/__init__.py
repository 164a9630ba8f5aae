"""What looks at prompts before they are drawn and at images before they leave. Every failure of a
guard closes.
"""
