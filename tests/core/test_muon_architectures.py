"""The rule for roles on architectures of transformers, timm, torchvision and diffusers, built without allocation.

What each table says was decided by looking at the architecture. A line is a pattern of names, the role, and for a
matrix how it is made of several. `*` stands for a number or another part of a name without a dot, braces for several
names; the first line that fits a name counts. Parameters of fewer than two dimensions are not listed: they are always
vectors."""

import re
import warnings

import pytest
import torch

from sgd_sai.muon_role_table import role_table
from sgd_sai.muon_roles import parameter_roles

SMALL = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128)
GROUPED = SMALL | dict(num_key_value_heads=2)  # two heads of the queries for each of the keys
GPT2 = dict(n_embd=64, n_head=4, n_layer=2)


def of_transformers(name, config, **kwargs):
    library = pytest.importorskip("transformers")
    if not hasattr(library, name):
        pytest.skip(f"this version of transformers has no {name}")
    return getattr(library, name)(getattr(library, config)(**kwargs))


def of_timm(name, **kwargs):
    return pytest.importorskip("timm").create_model(name, pretrained=False, **kwargs)


def of_torchvision(name, **kwargs):
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None, **kwargs)


def of_diffusers(name, **kwargs):
    return getattr(pytest.importorskip("diffusers"), name)(**kwargs)


def on_meta(make):
    "A model without memory for its parameters, and without the warnings of its library."
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return make()


ARCHITECTURES = {
    "BertForSequenceClassification": (
        lambda: of_transformers("BertForSequenceClassification", "BertConfig", **SMALL),
        """
        bert.embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight  embedding
        bert.encoder.layer.*.attention.self.{query,key,value}.weight                        matrix
        bert.encoder.layer.*.attention.output.dense.weight                                  matrix
        bert.encoder.layer.*.{intermediate,output}.dense.weight                             matrix
        bert.pooler.dense.weight                                                            matrix
        classifier.weight                                                                   head
        """,
    ),
    "BertModel": (
        lambda: of_transformers("BertModel", "BertConfig", **SMALL),
        """
        embeddings.{word_embeddings,position_embeddings,token_type_embeddings}.weight  embedding
        encoder.layer.*.attention.self.{query,key,value}.weight                        matrix
        encoder.layer.*.attention.output.dense.weight                                  matrix
        encoder.layer.*.{intermediate,output}.dense.weight                             matrix
        pooler.dense.weight                                                            matrix
        """,
    ),
    "RobertaForMaskedLM": (
        lambda: of_transformers("RobertaForMaskedLM", "RobertaConfig", **SMALL),
        """
        roberta.embeddings.word_embeddings.weight                              head
        roberta.embeddings.{token_type_embeddings,position_embeddings}.weight  embedding
        roberta.encoder.layer.*.attention.self.{query,key,value}.weight        matrix
        roberta.encoder.layer.*.attention.output.dense.weight                  matrix
        roberta.encoder.layer.*.{intermediate,output}.dense.weight             matrix
        lm_head.dense.weight                                                   matrix
        """,
    ),
    "XLMRobertaForCausalLM, which lists its head first": (
        lambda: of_transformers("XLMRobertaForCausalLM", "XLMRobertaConfig", **SMALL),
        """
        lm_head.dense.weight                                                   matrix
        lm_head.decoder.weight                                                 head
        roberta.embeddings.{token_type_embeddings,position_embeddings}.weight  embedding
        roberta.encoder.layer.*.attention.self.{query,key,value}.weight        matrix
        roberta.encoder.layer.*.attention.output.dense.weight                  matrix
        roberta.encoder.layer.*.{intermediate,output}.dense.weight             matrix
        """,
    ),
    "ModernBertForMaskedLM": (
        lambda: of_transformers("ModernBertForMaskedLM", "ModernBertConfig", **SMALL),
        """
        model.embeddings.tok_embeddings.weight  head
        model.layers.*.attn.Wqkv.weight         matrix split=(64,64,64)
        model.layers.*.{attn,mlp}.Wo.weight     matrix
        model.layers.*.mlp.Wi.weight            matrix split=(128,128)
        head.dense.weight                       matrix
        """,
    ),
    "DebertaV2ForQuestionAnswering": (
        lambda: of_transformers(
            "DebertaV2ForQuestionAnswering",
            "DebertaV2Config",
            **SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        """
        deberta.embeddings.{word_embeddings,position_embeddings}.weight                 embedding
        deberta.encoder.layer.*.attention.self.{query_proj,key_proj,value_proj}.weight  matrix
        deberta.encoder.layer.*.attention.self.{pos_key_proj,pos_query_proj}.weight     matrix
        deberta.encoder.layer.*.attention.output.dense.weight                           matrix
        deberta.encoder.layer.*.{intermediate,output}.dense.weight                      matrix
        deberta.encoder.rel_embeddings.weight                                           embedding
        qa_outputs.weight                                                               head
        """,
    ),
    "T5ForConditionalGeneration": (
        lambda: of_transformers(
            "T5ForConditionalGeneration", "T5Config", d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2
        ),
        """
        shared.weight                                                                   head
        {encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o}.weight                matrix
        {encoder,decoder}.block.*.layer.*.SelfAttention.relative_attention_bias.weight  embedding
        {encoder,decoder}.block.*.layer.*.DenseReluDense.{wi,wo}.weight                 matrix
        decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}.weight                        matrix
        """,
    ),
    "GPT2LMHeadModel": (
        lambda: of_transformers("GPT2LMHeadModel", "GPT2Config", **GPT2),
        """
        transformer.wte.weight                    head
        transformer.wpe.weight                    embedding
        transformer.h.*.attn.c_attn.weight        matrix transposed split=(64,64,64)
        transformer.h.*.{attn,mlp}.c_proj.weight  matrix transposed
        transformer.h.*.mlp.c_fc.weight           matrix transposed
        """,
    ),
    "GPT2Model": (
        lambda: of_transformers("GPT2Model", "GPT2Config", **GPT2),
        """
        {wte,wpe}.weight              embedding
        h.*.attn.c_attn.weight        matrix transposed split=(64,64,64)
        h.*.{attn,mlp}.c_proj.weight  matrix transposed
        h.*.mlp.c_fc.weight           matrix transposed
        """,
    ),
    "LlamaForCausalLM": (
        lambda: of_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED),
        """
        model.embed_tokens.weight                                      embedding
        model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight  matrix
        model.layers.*.mlp.{gate_proj,up_proj,down_proj}.weight        matrix
        lm_head.weight                                                 head
        """,
    ),
    "Phi3ForCausalLM": (
        lambda: of_transformers("Phi3ForCausalLM", "Phi3Config", **GROUPED, pad_token_id=0),
        """
        model.embed_tokens.weight                 embedding
        model.layers.*.self_attn.o_proj.weight    matrix
        model.layers.*.self_attn.qkv_proj.weight  matrix split=(64,32,32)
        model.layers.*.mlp.gate_up_proj.weight    matrix split=(128,128)
        model.layers.*.mlp.down_proj.weight       matrix
        lm_head.weight                            head
        """,
    ),
    "GPTNeoXForCausalLM": (
        lambda: of_transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL),
        """
        gpt_neox.embed_in.weight                                    embedding
        gpt_neox.layers.*.attention.query_key_value.weight          matrix split=(16,16,16)
        gpt_neox.layers.*.attention.dense.weight                    matrix
        gpt_neox.layers.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight  matrix
        lm_head.weight                                              head
        """,
    ),
    "BloomForCausalLM": (
        lambda: of_transformers("BloomForCausalLM", "BloomConfig", hidden_size=64, n_head=4, n_layer=2),
        """
        transformer.word_embeddings.weight                        head
        transformer.h.*.self_attention.query_key_value.weight     matrix split=(16,16,16)
        transformer.h.*.self_attention.dense.weight               matrix
        transformer.h.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight  matrix
        """,
    ),
    "FalconForCausalLM": (
        lambda: of_transformers(
            "FalconForCausalLM", "FalconConfig", hidden_size=64, num_attention_heads=4, num_hidden_layers=2
        ),
        """
        transformer.word_embeddings.weight                        head
        transformer.h.*.self_attention.query_key_value.weight     matrix split=(64,16,16)
        transformer.h.*.self_attention.dense.weight               matrix
        transformer.h.*.mlp.{dense_h_to_4h,dense_4h_to_h}.weight  matrix
        """,
    ),
    "MixtralForCausalLM": (
        lambda: of_transformers("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
        """
        model.embed_tokens.weight                                      embedding
        model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight  matrix
        model.layers.*.mlp.gate.weight                                 matrix
        model.layers.*.mlp.experts.gate_up_proj                        matrix stacked split=(128,128)
        model.layers.*.mlp.experts.down_proj                           matrix stacked
        lm_head.weight                                                 head
        """,
    ),
    "GptOssForCausalLM": (
        lambda: of_transformers("GptOssForCausalLM", "GptOssConfig", **GROUPED, num_local_experts=4, head_dim=16),
        """
        model.embed_tokens.weight                                      embedding
        model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight  matrix
        model.layers.*.mlp.router.weight                               matrix
        model.layers.*.mlp.experts.gate_up_proj                        matrix stacked transposed split=(1,1)
        model.layers.*.mlp.experts.{gate_up_proj_bias,down_proj_bias}  vector
        model.layers.*.mlp.experts.down_proj                           matrix stacked transposed
        lm_head.weight                                                 head
        """,
    ),
    "MambaForCausalLM": (
        lambda: of_transformers("MambaForCausalLM", "MambaConfig", hidden_size=64, num_hidden_layers=2, state_size=8),
        """
        backbone.embeddings.weight                                        head
        backbone.layers.*.mixer.A_log                                     vector
        backbone.layers.*.mixer.conv1d.weight                             vector
        backbone.layers.*.mixer.{in_proj,x_proj,dt_proj,out_proj}.weight  matrix
        """,
    ),
    "ViTForImageClassification": (
        lambda: of_transformers("ViTForImageClassification", "ViTConfig", **SMALL),
        """
        vit.embeddings.{cls_token,position_embeddings}               embedding
        vit.embeddings.patch_embeddings.projection.weight            embedding
        vit.layers.*.attention.{q_proj,k_proj,v_proj,o_proj}.weight  matrix
        vit.layers.*.mlp.{fc1,fc2}.weight                            matrix
        classifier.weight                                            head
        """,
    ),
    "ViTModel": (
        lambda: of_transformers("ViTModel", "ViTConfig", **SMALL),
        """
        embeddings.{cls_token,position_embeddings}               embedding
        embeddings.patch_embeddings.projection.weight            embedding
        layers.*.attention.{q_proj,k_proj,v_proj,o_proj}.weight  matrix
        layers.*.mlp.{fc1,fc2}.weight                            matrix
        pooler.dense.weight                                      matrix
        """,
    ),
    "CLIPModel": (
        lambda: of_transformers("CLIPModel", "CLIPConfig", text_config=SMALL, vision_config=SMALL),
        """
        text_model.embeddings.{token_embedding,position_embedding}.weight                            embedding
        {text_model,vision_model}.encoder.layers.*.self_attn.{k_proj,v_proj,q_proj,out_proj}.weight  matrix
        {text_model,vision_model}.encoder.layers.*.mlp.{fc1,fc2}.weight                              matrix
        vision_model.embeddings.{patch_embedding,position_embedding}.weight                          embedding
        {visual_projection,text_projection}.weight                                                   head
        """,
    ),
    "WhisperForConditionalGeneration": (
        lambda: of_transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
        ),
        """
        model.encoder.{conv1,embed_positions}.weight                                       embedding
        model.encoder.conv2.weight                                                         matrix
        model.{encoder,decoder}.layers.*.self_attn.{k_proj,v_proj,q_proj,out_proj}.weight  matrix
        model.{encoder,decoder}.layers.*.{fc1,fc2}.weight                                  matrix
        model.decoder.embed_tokens.weight                                                  head
        model.decoder.embed_positions.weight                                               embedding
        model.decoder.layers.*.encoder_attn.{k_proj,v_proj,q_proj,out_proj}.weight         matrix
        """,
    ),
    "Wav2Vec2ForCTC": (
        lambda: of_transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", **SMALL),
        """
        wav2vec2.feature_extractor.conv_layers.0.conv.weight                             embedding
        wav2vec2.feature_extractor.conv_layers.{1,2,3,4,5,6}.conv.weight                 matrix
        wav2vec2.feature_projection.projection.weight                                    matrix
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0           vector
        wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1           matrix split=4
        wav2vec2.encoder.layers.*.attention.{k_proj,v_proj,q_proj,out_proj}.weight       matrix
        wav2vec2.encoder.layers.*.feed_forward.{intermediate_dense,output_dense}.weight  matrix
        lm_head.weight                                                                   head
        """,
    ),
    "SegformerForSemanticSegmentation": (
        lambda: of_transformers("SegformerForSemanticSegmentation", "SegformerConfig"),
        """
        segformer.stages.0.patch_embeddings.proj.weight                                     embedding
        segformer.stages.{1,2,3}.patch_embeddings.proj.weight                               matrix
        segformer.stages.*.blocks.*.attention.{q_proj,k_proj,v_proj,o_proj}.weight          matrix
        segformer.stages.*.blocks.*.attention.sequence_reduction.sequence_reduction.weight  matrix
        segformer.stages.*.blocks.*.mlp.{fc1,fc2}.weight                                    matrix
        segformer.stages.*.blocks.*.mlp.dwconv.dwconv.weight                                vector
        decode_head.linear_projections.*.proj.weight                                        matrix
        decode_head.linear_fuse.weight                                                      matrix
        decode_head.classifier.weight                                                       head
        """,
    ),
    "timm, vit_base_patch16_224": (
        lambda: of_timm("vit_base_patch16_224"),
        """
        {cls_token,pos_embed}          embedding
        patch_embed.proj.weight        embedding
        blocks.*.attn.qkv.weight       matrix split=(768,768,768)
        blocks.*.attn.proj.weight      matrix
        blocks.*.mlp.{fc1,fc2}.weight  matrix
        head.weight                    head
        """,
    ),
    "timm, vit_base_patch16_224 without a head": (
        lambda: of_timm("vit_base_patch16_224", num_classes=0),
        """
        {cls_token,pos_embed}          embedding
        patch_embed.proj.weight        embedding
        blocks.*.attn.qkv.weight       matrix split=(768,768,768)
        blocks.*.attn.proj.weight      matrix
        blocks.*.mlp.{fc1,fc2}.weight  matrix
        """,
    ),
    "timm, convnext_tiny": (
        lambda: of_timm("convnext_tiny"),
        """
        stem.*.weight                           embedding
        stages.*.blocks.*.conv_dw.weight        vector
        stages.*.blocks.*.mlp.{fc1,fc2}.weight  matrix
        stages.*.downsample.*.weight            matrix
        head.fc.weight                          head
        """,
    ),
    "timm, efficientnet_b0": (
        lambda: of_timm("efficientnet_b0"),
        """
        conv_stem.weight                                embedding
        blocks.*.*.conv_dw.weight                       vector
        blocks.*.*.se.{conv_reduce,conv_expand}.weight  matrix
        blocks.*.*.{conv_pw,conv_pwl}.weight            matrix
        conv_head.weight                                matrix
        classifier.weight                               head
        """,
    ),
    "timm, efficientnet_b0 without a head": (
        lambda: of_timm("efficientnet_b0", num_classes=0),
        """
        conv_stem.weight                                embedding
        blocks.*.*.conv_dw.weight                       vector
        blocks.*.*.se.{conv_reduce,conv_expand}.weight  matrix
        blocks.*.*.{conv_pw,conv_pwl}.weight            matrix
        conv_head.weight                                matrix
        """,
    ),
    "timm, swin_tiny_patch4_window7_224": (
        lambda: of_timm("swin_tiny_patch4_window7_224"),
        """
        patch_embed.proj.weight                              embedding
        layers.*.blocks.*.attn.relative_position_bias_table  embedding
        layers.0.blocks.*.attn.qkv.weight                    matrix split=(96,96,96)
        layers.1.blocks.*.attn.qkv.weight                    matrix split=(192,192,192)
        layers.2.blocks.*.attn.qkv.weight                    matrix split=(384,384,384)
        layers.3.blocks.*.attn.qkv.weight                    matrix split=(768,768,768)
        layers.*.blocks.*.attn.proj.weight                   matrix
        layers.*.blocks.*.mlp.{fc1,fc2}.weight               matrix
        layers.*.downsample.reduction.weight                 matrix
        head.fc.weight                                       head
        """,
    ),
    "timm, deit_tiny_distilled_patch16_224": (
        lambda: of_timm("deit_tiny_distilled_patch16_224"),
        """
        {cls_token,pos_embed,dist_token}  embedding
        patch_embed.proj.weight           embedding
        blocks.*.attn.qkv.weight          matrix split=(192,192,192)
        blocks.*.attn.proj.weight         matrix
        blocks.*.mlp.{fc1,fc2}.weight     matrix
        {head,head_dist}.weight           head
        """,
    ),
    "timm, resnext50_32x4d": (
        lambda: of_timm("resnext50_32x4d"),
        """
        conv1.weight                                          embedding
        {layer1,layer2,layer3,layer4}.*.{conv1,conv3}.weight  matrix
        layer1.*.conv2.weight                                 matrix split=4
        {layer1,layer2,layer3,layer4}.*.downsample.*.weight   matrix
        layer2.*.conv2.weight                                 matrix split=8
        layer3.*.conv2.weight                                 matrix split=16
        layer4.*.conv2.weight                                 matrix split=32
        fc.weight                                             head
        """,
    ),
    "torchvision, resnet50": (
        lambda: of_torchvision("resnet50"),
        """
        conv1.weight                                                embedding
        {layer1,layer2,layer3,layer4}.*.{conv1,conv2,conv3}.weight  matrix
        {layer1,layer2,layer3,layer4}.*.downsample.*.weight         matrix
        fc.weight                                                   head
        """,
    ),
    "torchvision, mobilenet_v3_small": (
        lambda: of_torchvision("mobilenet_v3_small"),
        """
        features.0.*.weight                                embedding
        features.12.*.weight                               matrix
        features.1.block.0.*.weight                        vector
        features.{1,2,3}.block.2.*.weight                  matrix
        features.{2,3,4,5,6,7,8,9,10,11}.block.0.*.weight  matrix
        features.{2,3,4,5,6,7,8,9,10,11}.block.1.*.weight  vector
        features.{4,5,6,7,8,9,10,11}.block.3.*.weight      matrix
        features.*.block.*.{fc1,fc2}.weight                matrix
        classifier.0.weight                                matrix
        classifier.3.weight                                head
        """,
    ),
    "torchvision, vit_b_16": (
        lambda: of_torchvision("vit_b_16"),
        """
        class_token                                                    embedding
        conv_proj.weight                                               embedding
        encoder.pos_embedding                                          embedding
        encoder.layers.encoder_layer_*.self_attention.in_proj_weight   matrix split=(768,768,768)
        encoder.layers.encoder_layer_*.self_attention.out_proj.weight  matrix
        encoder.layers.encoder_layer_*.mlp.*.weight                    matrix
        heads.head.weight                                              head
        """,
    ),
    "torchvision, vgg11": (
        lambda: of_torchvision("vgg11"),
        """
        features.0.weight                    embedding
        features.{3,6,8,11,13,16,18}.weight  matrix
        classifier.{0,3}.weight              matrix
        classifier.6.weight                  head
        """,
    ),
    "torchvision, fasterrcnn_mobilenet_v3_large_fpn": (
        lambda: of_torchvision("fasterrcnn_mobilenet_v3_large_fpn", weights_backbone=None),
        """
        backbone.body.0.*.weight                                            embedding
        backbone.body.16.*.weight                                           matrix
        backbone.body.1.block.0.*.weight                                    vector
        backbone.body.1.block.1.*.weight                                    matrix
        backbone.body.{2,3,7,8,9,10}.block.{0,2}.*.weight                   matrix
        backbone.body.{2,3,4,5,6,7,8,9,10,11,12,13,14,15}.block.1.*.weight  vector
        backbone.body.{4,5,6,11,12,13,14,15}.block.{0,3}.*.weight           matrix
        backbone.body.*.block.*.{fc1,fc2}.weight                            matrix
        backbone.fpn.{inner_blocks,layer_blocks}.*.*.weight                 matrix
        rpn.head.conv.*.*.weight                                            matrix
        rpn.head.{cls_logits,bbox_pred}.weight                              head
        roi_heads.box_head.{fc6,fc7}.weight                                 matrix
        roi_heads.box_predictor.{cls_score,bbox_pred}.weight                head
        """,
    ),
    "UNet2DModel": (
        lambda: of_diffusers(
            "UNet2DModel",
            sample_size=32,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
        ),
        """
        conv_in.weight                                                                        embedding
        time_embedding.{linear_1,linear_2}.weight                                             matrix
        {down_blocks,up_blocks}.*.resnets.*.{conv1,time_emb_proj,conv2,conv_shortcut}.weight  matrix
        down_blocks.*.downsamplers.*.conv.weight                                              matrix
        {down_blocks,up_blocks}.*.attentions.*.{to_q,to_k,to_v}.weight                        matrix
        {down_blocks,up_blocks}.*.attentions.*.to_out.*.weight                                matrix
        up_blocks.*.upsamplers.*.conv.weight                                                  matrix
        mid_block.attentions.*.{to_q,to_k,to_v}.weight                                        matrix
        mid_block.attentions.*.to_out.*.weight                                                matrix
        mid_block.resnets.*.{conv1,time_emb_proj,conv2}.weight                                matrix
        conv_out.weight                                                                       head
        """,
    ),
    "UNet2DConditionModel": (
        lambda: of_diffusers(
            "UNet2DConditionModel",
            sample_size=32,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        """
        conv_in.weight                                                                                     embedding
        time_embedding.{linear_1,linear_2}.weight                                                          matrix
        {down_blocks,up_blocks}.*.attentions.*.{proj_in,proj_out}.weight                                   matrix
        {down_blocks,up_blocks}.*.attentions.*.transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v}.weight  matrix
        {down_blocks,up_blocks}.*.attentions.*.transformer_blocks.*.{attn1,attn2}.to_out.*.weight          matrix
        {down_blocks,up_blocks}.*.attentions.*.transformer_blocks.*.ff.net.*.proj.weight                   matrix
        {down_blocks,up_blocks}.*.attentions.*.transformer_blocks.*.ff.net.*.weight                        matrix
        {down_blocks,up_blocks}.*.resnets.*.{conv1,time_emb_proj,conv2,conv_shortcut}.weight               matrix
        down_blocks.*.downsamplers.*.conv.weight                                                           matrix
        up_blocks.*.upsamplers.*.conv.weight                                                               matrix
        mid_block.attentions.*.{proj_in,proj_out}.weight                                                   matrix
        mid_block.attentions.*.transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v}.weight                  matrix
        mid_block.attentions.*.transformer_blocks.*.{attn1,attn2}.to_out.*.weight                          matrix
        mid_block.attentions.*.transformer_blocks.*.ff.net.*.proj.weight                                   matrix
        mid_block.attentions.*.transformer_blocks.*.ff.net.*.weight                                        matrix
        mid_block.resnets.*.{conv1,time_emb_proj,conv2}.weight                                             matrix
        conv_out.weight                                                                                    head
        """,
    ),
    "AutoencoderKL": (
        lambda: of_diffusers(
            "AutoencoderKL",
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
        ),
        """
        {encoder,decoder}.conv_in.weight                                    embedding
        encoder.down_blocks.*.resnets.*.{conv1,conv2,conv_shortcut}.weight  matrix
        encoder.down_blocks.*.downsamplers.*.conv.weight                    matrix
        {encoder,decoder}.mid_block.attentions.*.{to_q,to_k,to_v}.weight    matrix
        {encoder,decoder}.mid_block.attentions.*.to_out.*.weight            matrix
        {encoder,decoder}.mid_block.resnets.*.{conv1,conv2}.weight          matrix
        {encoder,decoder}.conv_out.weight                                   head
        decoder.up_blocks.*.resnets.*.{conv1,conv2,conv_shortcut}.weight    matrix
        decoder.up_blocks.*.upsamplers.*.conv.weight                        matrix
        quant_conv.weight                                                   matrix
        post_quant_conv.weight                                              embedding
        """,
    ),
    "DiTTransformer2DModel": (
        lambda: of_diffusers("DiTTransformer2DModel", num_layers=2, num_attention_heads=4, attention_head_dim=16),
        """
        pos_embed.proj.weight                                                        embedding
        transformer_blocks.*.norm1.emb.timestep_embedder.{linear_1,linear_2}.weight  matrix
        transformer_blocks.*.norm1.emb.class_embedder.embedding_table.weight         embedding
        transformer_blocks.*.norm1.linear.weight                                     matrix
        transformer_blocks.*.attn1.{to_q,to_k,to_v}.weight                           matrix
        transformer_blocks.*.attn1.to_out.*.weight                                   matrix
        transformer_blocks.*.ff.net.*.proj.weight                                    matrix
        transformer_blocks.*.ff.net.*.weight                                         matrix
        proj_out_1.weight                                                            matrix
        proj_out_2.weight                                                            head
        """,
    ),
    "FluxTransformer2DModel": (
        lambda: of_diffusers(
            "FluxTransformer2DModel",
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        """
        time_text_embed.{timestep_embedder,text_embedder}.{linear_1,linear_2}.weight                   matrix
        {context_embedder,x_embedder}.weight                                                           embedding
        transformer_blocks.*.{norm1,norm1_context}.linear.weight                                       matrix
        transformer_blocks.*.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_add_out}.weight  matrix
        transformer_blocks.*.attn.to_out.*.weight                                                      matrix
        transformer_blocks.*.{ff,ff_context}.net.*.proj.weight                                         matrix
        transformer_blocks.*.{ff,ff_context}.net.*.weight                                              matrix
        single_transformer_blocks.*.norm.linear.weight                                                 matrix
        single_transformer_blocks.*.{proj_mlp,proj_out}.weight                                         matrix
        single_transformer_blocks.*.attn.{to_q,to_k,to_v}.weight                                       matrix
        norm_out.linear.weight                                                                         matrix
        proj_out.weight                                                                                head
        """,
    ),
}


def written_down(table):
    "The lines of a table: a regular expression for the names of each, and what it says."
    lines = []
    for line in table.strip().splitlines():
        pattern, said = line.split(maxsplit=1)
        regex = re.escape(pattern).replace(r"\*", "[^.]+")
        regex = re.sub(r"\\{(.*?)\\}", lambda braces: f"({braces[1].replace(',', '|')})", regex)
        lines.append((re.compile(regex), said))
    return lines


def as_written(row):
    "A role and its layout as the tables have them."
    words = [row.role, *(key for key in ("stacked", "transposed") if getattr(row, key))]
    return " ".join(words + [f"split={row.split}".replace(" ", "")] * (row.split is not None))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_sorted_as_written_down(name):
    make, table = ARCHITECTURES[name]
    model, lines, used = on_meta(make), written_down(table), set()
    wrong = []
    for row in parameter_roles(model):
        fits = next((i for i, (pattern, _) in enumerate(lines) if pattern.fullmatch(row.name)), None)
        if row.param.ndim >= 2:
            used.add(fits)
            expected = "not listed" if fits is None else lines[fits][1]
        else:
            expected = "vector"
        if as_written(row) != expected:
            wrong.append(f"{row.name}: {as_written(row)}, written down: {expected}")
    assert wrong == []
    assert used == set(range(len(lines))), "lines that fit no parameter"


def test_all_are_sorted_into_groups_that_are_complete():
    "Every parameter once, in the order of the model, and its table can be printed."
    model = on_meta(ARCHITECTURES["timm, swin_tiny_patch4_window7_224"][0])
    table = role_table(model)
    assert [row.name for row in table] == [name for name, _ in model.named_parameters()]
    assert max(map(len, repr(table).splitlines())) <= 120


HEADS_OF_16 = {
    "GPT2LMHeadModel": {"transformer.h.0.attn.c_attn.weight": 16},
    "LlamaForCausalLM": {
        "model.layers.0.self_attn.q_proj.weight": 16,
        "model.layers.0.self_attn.v_proj.weight": 16,
        "model.layers.0.self_attn.o_proj.weight": None,
    },
    "Phi3ForCausalLM": {"model.layers.0.self_attn.qkv_proj.weight": 16},
    "GPTNeoXForCausalLM": {"gpt_neox.layers.0.attention.query_key_value.weight": 16},
    "BertModel": {"encoder.layer.0.attention.self.query.weight": 16},
    "T5ForConditionalGeneration": {"decoder.block.0.layer.1.EncDecAttention.k.weight": 16},
    "timm, vit_base_patch16_224": {"blocks.0.attn.qkv.weight": 64, "blocks.0.attn.proj.weight": None},
    "torchvision, vit_b_16": {"encoder.layers.encoder_layer_0.self_attention.in_proj_weight": 64},
    "FluxTransformer2DModel": {"transformer_blocks.0.attn.add_k_proj.weight": 16},
}


@pytest.mark.parametrize("name", HEADS_OF_16)
def test_by_head(name):
    rows = {row.name: row for row in parameter_roles(on_meta(ARCHITECTURES[name][0]), by_head=True)}
    assert {key: rows[key].split for key in HEADS_OF_16[name]} == HEADS_OF_16[name]


FUSED = {  # layouts that follow from the code of the model, beyond those above
    "Falcon, a key for all queries": ("Falcon", dict(multi_query=True), (64, 16, 16)),
    "Falcon, a key for each query": ("Falcon", dict(multi_query=False), (16, 16, 16)),
    "Falcon, new": ("Falcon", dict(new_decoder_architecture=True, num_kv_heads=2), (32, 16, 16)),
    "Persimmon": ("Persimmon", {}, (16, 16, 16)),
    "MPT": ("Mpt", dict(d_model=64, n_heads=4, n_layers=2), (64, 64, 64)),
    "CodeGen": ("CodeGen", GPT2 | dict(rotary_dim=8), (16, 16, 16)),
    "GPTBigCode, a key for all queries": ("GPTBigCode", GPT2 | dict(multi_query=True), (64, 16, 16)),
    "GPTBigCode, a key for each query": ("GPTBigCode", GPT2 | dict(multi_query=False), (16, 16, 16)),
}


@pytest.mark.parametrize("name", FUSED)
def test_query_key_and_value_in_one(name):
    kind, kwargs, expected = FUSED[name]
    sizes = {} if "n_layer" in kwargs or "n_layers" in kwargs else SMALL
    if kind == "Falcon":
        sizes = {key: SMALL[key] for key in SMALL if key != "intermediate_size"}
    model = on_meta(lambda: of_transformers(f"{kind}ForCausalLM", f"{kind}Config", **sizes | kwargs))
    found = {row.split for row in parameter_roles(model) if re.search("qkv|query_key_value|c_attn", row.name)} - {None}
    assert found == {expected}
