package main

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/filters"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
)

const target = "containerd.io/snapshot.ref"

// memory keeps names, parents and labels. It claims every layer that is asked for as published.
type memory struct {
	mu  sync.RWMutex
	all map[string]snapshots.Info
}

func described(opts []snapshots.Opt) (info snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, err
		}
	}
	return info, nil
}

func (m *memory) create(kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	info, err := described(opts)
	if err != nil {
		return nil, err
	}
	name := key
	reference, pulled := info.Labels[target]
	if pulled {
		kind, name = snapshots.KindCommitted, parent+" "+reference
	}
	info.Kind, info.Name, info.Parent, info.Created = kind, name, parent, time.Now().UTC()
	info.Updated = info.Created
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.all[parent]; parent != "" && !ok {
		return nil, errdefs.ErrNotFound
	}
	if _, ok := m.all[name]; ok {
		return nil, errdefs.ErrAlreadyExists
	}
	m.all[name] = info
	if pulled {
		return nil, errdefs.ErrAlreadyExists
	}
	return nothing(), nil
}

// nothing describes a mount that is never made.
func nothing() []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: "/nonexistent", Options: []string{"rw", "rbind"}}}
}

func (m *memory) Prepare(_ context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return m.create(snapshots.KindActive, key, parent, opts)
}

func (m *memory) View(_ context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return m.create(snapshots.KindView, key, parent, opts)
}

func (m *memory) Stat(_ context.Context, key string) (snapshots.Info, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	info, ok := m.all[key]
	if !ok {
		return info, errdefs.ErrNotFound
	}
	return info, nil
}

func (m *memory) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if _, err := m.Stat(ctx, key); err != nil {
		return nil, err
	}
	return nothing(), nil
}

func (m *memory) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	_, err = m.Stat(ctx, key)
	return usage, err
}

func (m *memory) Update(_ context.Context, info snapshots.Info, _ ...string) (snapshots.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	known, ok := m.all[info.Name]
	if !ok {
		return known, errdefs.ErrNotFound
	}
	known.Labels, known.Updated = info.Labels, time.Now().UTC()
	m.all[info.Name] = known
	return known, nil
}

func (m *memory) Commit(_ context.Context, name, key string, opts ...snapshots.Opt) error {
	labels, err := described(opts)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	info, ok := m.all[key]
	if !ok {
		return errdefs.ErrNotFound
	}
	if _, ok := m.all[name]; ok {
		return errdefs.ErrAlreadyExists
	}
	delete(m.all, key)
	info.Kind, info.Name, info.Labels, info.Updated = snapshots.KindCommitted, name, labels.Labels, time.Now().UTC()
	m.all[name] = info
	return nil
}

func (m *memory) Remove(_ context.Context, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.all[key]; !ok {
		return errdefs.ErrNotFound
	}
	for _, other := range m.all {
		if other.Parent == key {
			return errdefs.ErrFailedPrecondition
		}
	}
	delete(m.all, key)
	return nil
}

func (m *memory) Walk(ctx context.Context, fn snapshots.WalkFunc, wanted ...string) error {
	filter, err := filters.ParseAll(wanted...)
	if err != nil {
		return err
	}
	m.mu.RLock()
	matching := make([]snapshots.Info, 0, 1)
	for _, info := range m.all {
		if filter.Match(adapt(info)) {
			matching = append(matching, info)
		}
	}
	m.mu.RUnlock()
	for _, info := range matching {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

func adapt(info snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case len(path) == 0:
			return "", false
		case path[0] == "name":
			return info.Name, true
		case path[0] == "parent":
			return info.Parent, true
		case path[0] == "kind":
			return strings.ToLower(info.Kind.String()), true
		case path[0] == "labels":
			value, ok := info.Labels[strings.Join(path[1:], ".")]
			return value, ok
		}
		return "", false
	})
}

func (m *memory) Cleanup(context.Context) error { return nil }

func (m *memory) Close() error { return nil }
