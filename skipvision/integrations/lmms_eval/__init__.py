"""Skip-Vision as a model of lmms-eval: any of its tasks, answered by the engine.

::

    lmms-eval --model skipvision --tasks mme,pope --batch_size 16
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,adapter=out/adapter

lmms-eval finds it by its entry point `plugin.manifest`. What is asked is made into chats and answered in
`answering`, which knows nothing of lmms-eval; `model` is the class that lmms-eval wants.
"""
