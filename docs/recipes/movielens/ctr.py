"""Who likes which film: `python ctr.py`, `torchrun ctr.py` or `trilith worker ctr:job`, behind `python data.py`."""

import torch
from torch import nn

import trilith.data
from trilith.estimator import Dense, EarlyStopping, Embedding, Estimator, Label, RunConfig, Sequence, Task, metrics
from trilith.tables import Adagrad


class Ctr(Task):
    user = Embedding(dim=16, optimizer=Adagrad(learning_rate=0.05), ttl_days=30)
    item = Embedding(dim=16, bias=True)
    seen = Sequence(item, length=50)  # item's rows, not pooled
    context = Dense(8)
    labels = {"click": Label(), "buy": Label(weight=5.0)}
    metrics = {"auc": metrics.Auc(), "logloss": metrics.LogLoss()}

    def build(self):
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.trunk = nn.Sequential(nn.LazyLinear(128), nn.BatchNorm1d(128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, 1) for name in self.labels})

    def forward(self, x):
        history, _ = self.attention(
            x.item.vector[:, None], x.seen.values, x.seen.values, key_padding_mask=~x.seen.mask, need_weights=False
        )
        deep = self.trunk(torch.cat([x.user.vector, x.item.vector, history[:, 0], x.context], 1))
        return {name: head(deep)[:, 0] + x.item.bias for name, head in self.heads.items()}


job = Estimator(
    Ctr(dense_optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3)),
    RunConfig(model_dir="model", epochs=3, save_every=100, prefetch=2, async_push=2),
    train=lambda: trilith.data.read("data/train-*.parquet").shuffle(100_000).batch(512),
    evaluate=lambda: trilith.data.read("data/valid.parquet").batch(8192),
    callbacks=[EarlyStopping("valid/click/auc", patience=2)],  # and TensorBoard(), where tensorboard is installed
)

if __name__ == "__main__":
    job.train()  # goes on at the newest checkpoint of model_dir
    print(job.evaluate())
    job.export("exports", mode="standalone")
