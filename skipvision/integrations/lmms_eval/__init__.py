"""The model `skipvision` of lmms-eval: the engine answers any task with ``output_type: generate_until``.

::

    lmms-eval --model skipvision --tasks mme,pope --batch_size 16
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,adapter=out/adapter

lmms-eval finds it by the entry point `plugin.manifest`. `answering` turns questions into chat requests and
does not import lmms-eval. `model` implements lmms-eval's model class on top of it.
"""
